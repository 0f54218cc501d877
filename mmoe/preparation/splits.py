"""Decides which recordings are held out: once, at preparation, from what the items say of themselves."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from mmoe.errors import DataError
from mmoe.hashing import blake2b
from mmoe.preparation.sources.base import Item

HeldoutBy = Literal["recordings", "size"]

GAP_NS = 2_000_000_000  # left out between the training part and the held-out tail of one recording
_NEAR = 0.5  # whole recordings must meet the share by size within this factor, else each gives its tail


@dataclass(frozen=True)
class Split:
    """Items by side, in their order; `gap` is what lies between the sides and goes to neither."""

    train: list[Item]
    heldout: list[Item]
    gap: list[Item]


@dataclass(frozen=True)
class Holdout:
    """Says what is to be held out: a `share` of the recordings or of their size, or the items that are `listed`."""

    share: float
    by: HeldoutBy = "recordings"
    listed: frozenset[str] | None = None  # keys of items and names of recordings; None: by share

    @property
    def everything(self) -> bool:
        """Whether the source is one held-out side, from which nothing is learned."""
        return self.listed is None and self.share == 1

    @property
    def nothing(self) -> bool:
        """Whether all of the source is for training."""
        return self.listed is None and self.share == 0

    def split(self, items: list[Item], gap: int) -> Split:
        """Return the `items` by side; see `split_recordings` for the `gap`. Raises DataError."""
        if self.listed is None:
            return split_recordings(items, self.share, gap, self.by)
        sides = Split([], [], [])
        for item in items:
            held = item.key in self.listed or item.recording in self.listed
            (sides.heldout if held else sides.train).append(item)
        return sides


def split_recordings(items: list[Item], share: float, gap: int, by: HeldoutBy = "recordings") -> Split:
    """Hold out about `share` of the recordings as wholes, at least one of them, or `by` size that of all they hold.

    Recordings of the highest rank go first, equal ranks by a keyed hash of their name; by size, those that are larger
    than what is still to be held out are passed over. The size of an item is its extent, or one where it has none.
    Where there are so few recordings (by size: so large) that the share is not met, and all of them may be cut
    (`Item.stop` > 0), each gives the last `share` of its extent instead, and what overlaps the `gap` before it (in the
    unit of the extent) goes to neither side.
    Raises DataError when there is but one recording and it may not be cut, and by size where units differ.
    """
    if share == 0 or not items:
        return Split(list(items), [], [])
    if share == 1:
        return Split([], list(items), [])
    recordings = {item.recording: item.rank for item in items}
    sizes = _sizes(items, by)
    drawn = sorted(recordings, key=lambda name: (-recordings[name], _keyed_hash(name), name))
    held = _draw(drawn, sizes, share, by)
    if by == "recordings":
        met = share * len(recordings) >= 1
    else:
        met = _NEAR * share <= sum(sizes[name] for name in held) <= share / _NEAR
    if not met and all(item.stop > 0 for item in items):
        tails = _tails(items, share, gap)
        if tails.heldout or len(recordings) < 2:  # recordings of an item or two have no tail to give
            return tails
    if len(recordings) < 2:
        raise DataError(
            f"the only recording is {next(iter(recordings))!r} and cannot be cut, so nothing can be held out; "
            "add recordings, or set prepare.heldout_share=0"
        )
    return Split([i for i in items if i.recording not in held], [i for i in items if i.recording in held], [])


def _sizes(items: list[Item], by: HeldoutBy) -> dict[str, float]:
    """By recording: its share of all there is. Raises DataError where that is counted in two units."""
    first = {item.unit: item.recording for item in reversed(items)}
    if by == "size" and len(first) > 1:
        counted = ", ".join(f"that of {name!r} in {unit}" for unit, name in sorted(first.items()))
        raise DataError(
            f"sizes do not add up: {counted}; leave prepare.heldout_by=size out, or prepare the files of each unit as "
            "a source of their own"
        )
    sizes: dict[str, float] = defaultdict(float)
    for item in items:
        sizes[item.recording] += max(1, item.stop - item.start) if by == "size" else 0
    total = sum(sizes.values()) or 1
    return {name: size / total for name, size in sizes.items()}


def _draw(drawn: list[str], sizes: dict[str, float], share: float, by: HeldoutBy) -> set[str]:
    """The recordings that are held out as wholes, of those `drawn`, in this order; never all of them."""
    if by == "recordings":
        return set(drawn[: min(max(1, round(len(drawn) * share)), len(drawn) - 1)])
    held: set[str] = set()
    left = share
    for name in drawn:
        if sizes[name] <= left and len(held) < len(drawn) - 1:
            held.add(name)
            left -= sizes[name]
    if not held and len(drawn) > 1:
        held = {min(drawn, key=lambda name: (sizes[name], _keyed_hash(name)))}
    return held


def _tails(items: list[Item], share: float, gap: int) -> Split:
    recordings: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        recordings[item.recording].append(item)
    tail = {}  # where the held-out part of each recording begins: the first item after `1 - share` of its extent
    for name, members in recordings.items():
        start, stop = min(i.start for i in members), max(i.stop for i in members)
        after = [i.start for i in members if i.start >= stop - round((stop - start) * share)]
        tail[name] = min(after, default=stop + gap)
    sides = Split([], [], [])
    for item in items:
        if item.start >= tail[item.recording]:
            sides.heldout.append(item)
        else:
            (sides.train if item.stop <= tail[item.recording] - gap else sides.gap).append(item)
    return sides


def _keyed_hash(name: str) -> bytes:
    return blake2b([name.encode()], 8, key=b"mmoe held-out")
