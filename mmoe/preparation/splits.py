"""Decides which recordings are held out: once, at preparation, from what the items say of themselves."""

from collections import defaultdict
from dataclasses import dataclass

from mmoe.errors import DataError
from mmoe.hashing import blake2b
from mmoe.preparation.sources.base import Item

GAP_NS = 2_000_000_000  # left out between the training part and the held-out tail of one recording


@dataclass(frozen=True)
class Split:
    """Items by side, in their order; `gap` is what lies between the sides and goes to neither."""

    train: list[Item]
    heldout: list[Item]
    gap: list[Item]


def split_recordings(items: list[Item], share: float, gap: int) -> Split:
    """Hold out about `share` of the recordings as wholes, at least one of them.

    Recordings of the highest rank go first, equal ranks by a keyed hash of their name. Where there are so few
    that one is more than `share`, and all of them may be cut (`Item.stop` > 0), each gives the last `share` of its
    extent instead, and what overlaps the `gap` before it (in the unit of the extent) goes to neither side.
    Raises DataError when there is but one recording and it may not be cut.
    """
    if share == 0 or not items:
        return Split(list(items), [], [])
    recordings = {item.recording: item.rank for item in items}
    if len(recordings) * share < 1 and all(item.stop > 0 for item in items):
        tails = _tails(items, share, gap)
        if tails.heldout or len(recordings) < 2:  # recordings of an item or two have no tail to give
            return tails
    if len(recordings) < 2:
        raise DataError(
            f"the only recording is {next(iter(recordings))!r} and cannot be cut, so nothing can be held out; "
            "add recordings, or set prepare.heldout_share=0"
        )
    count = min(max(1, round(len(recordings) * share)), len(recordings) - 1)
    drawn = sorted(recordings, key=lambda name: (-recordings[name], _keyed_hash(name), name))
    held = set(drawn[:count])
    return Split([i for i in items if i.recording not in held], [i for i in items if i.recording in held], [])


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
