"""Finds what a rank holds of every parameter: the shapes that tensor, expert and FSDP sharding leave, unmade."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from torch import nn

from mmoe.models.decoder import ModelConfig
from mmoe.parallel.mesh import ParallelDims
from mmoe.parallel.sharding_table import Unit, cut_of, unit_of
from mmoe.precision.config import PrecisionConfig


@dataclass(frozen=True)
class RankPlace:
    """Says where a rank is on the axes that cut parameters unevenly."""

    fsdp: int = 0
    tp: int = 0


@dataclass(frozen=True)
class Shard:
    """Describes a parameter as one rank of `tp` and `ep` has it, of `shape`, which FSDP then cuts in `parts`.

    FSDP gathers it with its `unit`; an element has `width` bytes then. `copied`: every rank of tp has it.
    """

    name: str
    shape: tuple[int, ...]
    unit: Unit
    parts: int
    width: int
    copied: bool

    @property
    def rows(self) -> int:
        """The size of the dimension that FSDP cuts."""
        return self.shape[self.unit.dim]

    @property
    def chunk(self) -> int:
        """The number of elements in the largest shard, which is what every rank sends."""
        return -(-self.rows // self.parts) * prod(self.shape) // max(self.rows, 1)

    @property
    def gathered(self) -> int:
        """The number of elements after a gather, padding included."""
        return self.chunk * self.parts

    def held(self, place: RankPlace) -> int:
        """Count the elements that the rank at `place` holds between the gathers."""
        here = size = -(-self.rows // self.parts)
        if self.unit.axis == "fsdp":  # ranks that share experts do so evenly
            here = min(size, max(self.rows - size * place.fsdp, 0))
        return here * prod(self.shape) // max(self.rows, 1)


def shards(
    config: ModelConfig, precision: PrecisionConfig, model: nn.Module, dims: ParallelDims, place: RankPlace
) -> list[Shard]:
    """Return a `Shard` of every parameter of `model` (as `on_meta` gives it), in its order."""
    found = []
    narrow = 2 if precision.compute == "bfloat16" else precision.parameter_dtype.itemsize
    for name, parameter in model.named_parameters():
        shape, unit = list(parameter.shape), unit_of(name)
        cut = cut_of(name, config.n_kv_heads, dims.tp)
        if cut is not None:
            ranks, rank = (dims.tp, place.tp) if cut.axis == "tp" else (dims.ep, 0)
            size = -(-shape[cut.dim] // ranks)
            shape[cut.dim] = min(size, max(shape[cut.dim] - size * rank, 0))
        width = narrow if unit.matrices else precision.parameter_dtype.itemsize
        found.append(Shard(name, tuple(shape), unit, getattr(dims, unit.axis), width, copied=cut is None))
    return found


def by_unit(found: list[Shard]) -> dict[str, list[Shard]]:
    """Group shards by the path of the unit that they are gathered with; the root's path is ""."""
    units: dict[str, list[Shard]] = defaultdict(list)
    for shard in found:
        units[shard.unit.path].append(shard)
    return dict(units)
