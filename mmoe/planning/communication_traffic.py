"""Counts bytes by axis of the mesh and collective: those of a run, and those of a formula, in the same terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.table import Table

from mmoe.parallel.mesh import ParallelDims

# The groups of a run by what they are for.
TRAFFIC_AXES = ("fsdp", "edp", "ep", "tp", "cp", "sequence", "data", "loss", "pp", "dp_replicate", "peers", "all")
GATHERED = ("fsdp", "edp", "tp", "cp", "sequence", "loss")
# What a collective among all ranks is counted for: the first of these axes that has them all.
WHOLE = {
    "all_gather": GATHERED,
    "reduce_scatter": GATHERED,
    "all_to_all": ("ep",),
    "all_reduce": ("dp_replicate", "tp", "all"),
    "broadcast": ("peers", "all"),
    "send": ("pp",),
    "receive": ("pp",),
}


class TrafficKind(NamedTuple):
    """Names a collective on an axis of the mesh."""

    axis: str
    collective: str


@dataclass
class Traffic:
    """Holds calls and bytes of each kind, of one rank; a group of one rank sends nothing and is left out.

    Bytes are those of the whole tensor that a collective is about: what an all-gather makes, what a reduce-scatter and
    an all-to-all take, what an all-reduce or a broadcast shares, what is sent or received.
    """

    calls: dict[TrafficKind, int] = field(default_factory=dict)
    bytes: dict[TrafficKind, int] = field(default_factory=dict)

    def add(self, axis: str, collective: str, size: int, calls: int = 1) -> None:
        """Count `calls` collectives of `size` bytes each on `axis`."""
        if calls:
            kind = TrafficKind(axis, collective)
            self.calls[kind] = self.calls.get(kind, 0) + calls
            self.bytes[kind] = self.bytes.get(kind, 0) + calls * size

    def __add__(self, other: Traffic) -> Traffic:
        total = Traffic(dict(self.calls), dict(self.bytes))
        for kind, size in other.bytes.items():
            total.calls[kind] = total.calls.get(kind, 0) + other.calls[kind]
            total.bytes[kind] = total.bytes.get(kind, 0) + size
        return total

    def times(self, number: int) -> Traffic:
        """Return the traffic of `number` parts like this one."""
        return Traffic(
            {kind: number * calls for kind, calls in self.calls.items() if number},
            {kind: number * size for kind, size in self.bytes.items() if number},
        )

    def over(self, number: int) -> Traffic:
        """Return an equal share of the traffic, one of `number`. Raises ValueError where it does not divide."""
        if any(value % number for value in (*self.calls.values(), *self.bytes.values())):
            raise ValueError(f"{self} is not {number} equal shares")
        return Traffic(
            {kind: calls // number for kind, calls in self.calls.items()},
            {kind: size // number for kind, size in self.bytes.items()},
        )

    def split(self, collectives: tuple[str, ...]) -> tuple[Traffic, Traffic]:
        """Split the traffic into that of these `collectives` and that of all others."""
        parts = Traffic(), Traffic()
        for kind, calls, size in self.rows():
            part = parts[kind.collective not in collectives]
            part.calls[kind], part.bytes[kind] = calls, size
        return parts

    def rows(self) -> Iterator[tuple[TrafficKind, int, int]]:
        """Yield (kind, calls, bytes) of each kind, the largest first."""
        for kind, size in sorted(self.bytes.items(), key=lambda item: (-item[1], item[0])):
            yield kind, self.calls[kind], size

    def by_axis(self) -> dict[str, int]:
        """Return the bytes of each axis."""
        sums: dict[str, int] = {}
        for kind, _, size in self.rows():
            sums[kind.axis] = sums.get(kind.axis, 0) + size
        return sums

    def table(self, dims: ParallelDims, title: str) -> Table:
        """Draw the traffic by axis and collective, with the bytes that a rank itself sends."""
        table = Table("axis", "ranks", "collective", "calls", "GB", "GB sent", title=title, title_justify="left")
        for column in (1, 3, 4, 5):
            table.columns[column].justify = "right"
        for kind, calls, size in self.rows():
            ranks = ranks_of(dims, kind.axis)
            sent = size * share_sent(kind.collective, ranks)
            gigabytes = (f"{amount / 1e9:.4g}" for amount in (size, sent))
            table.add_row(kind.axis, str(ranks), kind.collective, f"{calls:,}", *gigabytes)
        return table


def share_sent(collective: str, ranks: int) -> float:
    """Return the share of a collective's bytes that leaves each of its `ranks`.

    Collectives go by rings (Patarasuk and Yuan 2009), rows are evenly spread.
    """
    if collective == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (ranks - 1) / ranks
    return 0.0 if collective == "receive" else 1.0


def ranks_of(dims: ParallelDims, axis: str) -> int:
    """Return the number of ranks in one group of `axis`."""
    joined = {
        "data": dims.replicas,
        "sequence": dims.sequence_ranks,
        "loss": dims.replicas * dims.sequence_ranks,
        "peers": dims.pp * dims.sequence_ranks,
        "all": dims.world,
    }
    return joined[axis] if axis in joined else getattr(dims, axis)


def traffic_axis(dims: ParallelDims, axis: str, collective: str) -> str:
    """Return `axis`, or where its group has all ranks the name that this has for `collective`.

    torch has one group of all ranks for all purposes.
    """
    if ranks_of(dims, axis) < dims.world:
        return axis
    return next((name for name in WHOLE[collective] if ranks_of(dims, name) == dims.world), axis)
