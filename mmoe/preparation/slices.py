"""Builds the segments of time-sliced samples, for every reader that has clocks.

A reader gives a reference clock (the times of its slices) and the streams of the clip, each with a clock of its
own. The builder chooses what each slice holds of each stream, states its offset, leaves out what is absent, checks
alignment, applies the skew budget of captured members, and counts everything that was not as it should be.

R: references, N: readings of a stream, D: dimensions of a reading.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from mmoe.data.load.reading import reading
from mmoe.data.load.tables import load_npz
from mmoe.errors import counted_as
from mmoe.preparation.clocks import (
    ABSENT,
    SkewPolicy,
    check_alignment,
    check_clock,
    first_at_or_after,
    last_at_or_before,
    nearest,
)
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_CAMERA, NO_PAIR, Segment

ReadingChoice = Literal["last", "nearest", "first"]
ClockOrigin = Literal["captured", "synthetic"]

CLOCKS = "clocks.npz"  # the member of a time-sliced sample that holds its `Clocks`

# What is counted, by stream: `Sample.flags` has the keys "<stream>: <one of these>".
SKEW_KEPT = "beyond the skew budget, kept"
SKEW_LEFT_OUT = "beyond the skew budget, left out"
BEYOND_GAP = "absent, no reading within the maximum gap"
EDGE = "absent, slice lies before the first or after the last reading"
MISSING = "absent, the recording lacks this stream"
REPEATED = "exact repeat of the reading before it, dropped"
UNOBSERVED = "left out, nothing was observed"  # of the stream "slice"

BAD_CLOCK = "unusable clock"  # the reason of a `Refused` recording

_CHOICES = {"last": last_at_or_before, "nearest": nearest, "first": first_at_or_after}
_CAPTURED = (Modality.VISION, Modality.AUDIO)


@dataclass(frozen=True)
class SensorStream:
    """Holds a stream of a clip, and the rule by which a slice takes its share of it.

    `times_ns` [N] int64 is its clock in clip time, strictly increasing; [0] where the recording lacks the stream.
    `member` is the file of all its readings (reading i is row, frame or sample i of it), or one file name for each
    reading. `file_ns` [N] is the time that the file itself states for each reading, converted to clip time by
    another way than `times_ns` was; None where the file states none.

    `choice` is the last reading at or before the reference (causal; for anything an action is predicted from), the
    nearest, or the first at or after (actions). A reading further than `max_gap_ns` from the reference is absent,
    not stale. A segment holds `window` readings that end with the chosen one, fewer at the start of the member; an
    ACTION goes on to the end of its table.
    """

    name: str
    modality: Modality
    times_ns: np.ndarray
    member: str | Sequence[str]
    max_gap_ns: int | None
    choice: ReadingChoice = "last"
    window: int = 1
    camera: int = NO_CAMERA
    size: tuple[int, int] | Sequence[tuple[int, int]] = (0, 0)  # height, width in pixels: of all, or of each reading
    rate: int = 0  # Hz, of audio
    file_ns: np.ndarray | None = None


@dataclass(frozen=True)
class Texts:
    """Gives each slice a text, stored in `member`; `paired` makes text and images of a slice a contrastive pair."""

    member: str
    texts: Sequence[str]
    paired: bool = True


@dataclass(frozen=True)
class Slices:
    """Holds the segments of a clip, slice after slice, and the counts of what is not as it should be."""

    segments: list[Segment]
    flags: Counter[str]


def build_slices(
    reference_ns: np.ndarray,
    streams: Sequence[SensorStream],
    skew: SkewPolicy,
    where: str,
    texts: Texts | None = None,
) -> Slices:
    """Build the segments of the slices at `reference_ns` [R]: VISION first, ACTION and text last, else as in `streams`.

    A slice in which nothing was observed (nothing but actions and text) is left out; the others are numbered from 0
    without a hole. `where` names the recording in messages. Raises `Refused` for a clock that does not advance, a
    reading whose time is not its file's, and under the policy ``strict`` for a member beyond the skew budget.
    """
    flags: Counter[str] = Counter()
    streams = sorted(streams, key=lambda stream: _RANK.get(stream.modality, 1))
    with counted_as(BAD_CLOCK):
        check_clock(reference_ns, "reference", where)
        rows = {stream.name: _choose(stream, reference_ns, skew, where, flags) for stream in streams}
    if len(rows) < len(streams):
        raise ValueError(f"{where}: two streams have one name among {[stream.name for stream in streams]}")

    segments: list[Segment] = []
    number = 0
    for at, time_ns in enumerate(reference_ns.tolist()):
        held = [(stream, int(rows[stream.name][at])) for stream in streams if rows[stream.name][at] != ABSENT]
        if all(stream.modality is Modality.ACTION for stream, _ in held):
            flags[f"slice: {UNOBSERVED}"] += 1
            continue
        pair = number if texts is not None and texts.paired else NO_PAIR
        segments += [_segment(stream, row, number, time_ns, pair) for stream, row in held]
        if texts is not None:
            place = {"slice": number, "timestamp_ns": time_ns, "pair": pair}
            segments.append(Segment(Modality.TEXT, texts.member, text=texts.texts[at], **place))
        number += 1
    return Slices(segments, flags)


_RANK = {Modality.VISION: 0, Modality.ACTION: 2}


def _choose(
    stream: SensorStream, reference_ns: np.ndarray, skew: SkewPolicy, where: str, flags: Counter[str]
) -> np.ndarray:
    """The reading [R] of each slice, ABSENT where it has none; counts into `flags`."""
    times_ns = check_clock(stream.times_ns, stream.name, where)
    rows = _CHOICES[stream.choice](times_ns, reference_ns, stream.max_gap_ns)
    absent = rows == ABSENT
    if len(times_ns):
        inside = (reference_ns >= times_ns[0]) & (reference_ns <= times_ns[-1])
        counts = {BEYOND_GAP: int((absent & inside).sum()), EDGE: int((absent & ~inside).sum())}
    else:
        counts = {MISSING: len(reference_ns)}
    found = np.flatnonzero(~absent)
    raw_ns = times_ns[rows[found]]
    offset_ns = raw_ns - reference_ns[found]
    file_ns = raw_ns if stream.file_ns is None else stream.file_ns[rows[found]]
    check_alignment(reference_ns[found], offset_ns, raw_ns, file_ns, stream.name, where)
    if stream.modality in _CAPTURED:
        keep, beyond = skew.apply(offset_ns, stream.name, where)
        counts[SKEW_LEFT_OUT if skew.policy == "drop" else SKEW_KEPT] = beyond
        rows = rows.copy()
        rows[found[~keep]] = ABSENT
    flags.update({f"{stream.name}: {what}": count for what, count in counts.items() if count})
    return rows


def _segment(stream: SensorStream, row: int, number: int, time_ns: int, pair: int) -> Segment:
    if stream.modality is Modality.ACTION:
        start, stop = row, len(stream.times_ns)
    else:
        single = isinstance(stream.member, str)
        start, stop = (max(row + 1 - stream.window, 0), row + 1) if single else (0, 1)
    size = cast("tuple[int, int]", stream.size if isinstance(stream.size[0], int) else stream.size[row])
    height, width = size
    return Segment(
        stream.modality,
        stream.member if isinstance(stream.member, str) else stream.member[row],
        start,
        stop,
        height=height,
        width=width,
        rate=stream.rate,
        slice=number,
        camera=stream.camera,
        timestamp_ns=time_ns,
        offset_ns=int(stream.times_ns[row]) - time_ns,
        pair=pair if stream.modality is Modality.VISION else NO_PAIR,
    )


def held(
    times_ns: np.ndarray, stream_ns: np.ndarray, values: np.ndarray, max_gap_ns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values [R, D] of the last reading at or before each time [R], and which [R] are within the gap.

    This joins streams of different clocks into one table without reading the future. Rows that are not within the
    gap hold zeros; leave them out.
    """
    rows = last_at_or_before(stream_ns, times_ns, max_gap_ns)
    valid = rows != ABSENT
    table = np.zeros((len(times_ns), values.shape[1]), values.dtype)
    table[valid] = values[rows[valid]]
    return table, valid


def next_step(
    times_ns: np.ndarray, period_ns: int, logs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[slice, np.ndarray]:
    """Return the slice of the times [R] that have a reading one step later, and the table of those readings.

    Each of the `logs` is its times [N] and values [N, D]; of every log the last reading within the step is taken, side
    by side. The slice is the first unbroken run of times that have a reading of every log (rows stay a period apart);
    the table is [run, sum of D].
    """
    parts = [held(times_ns + period_ns, log_ns, values, period_ns) for log_ns, values in logs]
    valid = np.logical_and.reduce([valid for _, valid in parts])
    start = int(valid.argmax()) if valid.any() else len(valid)
    run = slice(start, start + int(np.logical_and.accumulate(valid[start:]).sum()))
    return run, np.concatenate([part for part, _ in parts], axis=1)[run]


def interpolated(
    times_ns: np.ndarray, stream_ns: np.ndarray, values: np.ndarray, max_gap_ns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate the values linearly at each time [R], between readings at most `max_gap_ns` apart.

    Returns values [R, D] and which of them [R] are within the gap, as `held` does, but it reads the future. The values
    stand in no file, so a reader makes a table of them at its references, and a stream of that table with the
    references as its clock.
    """
    before = last_at_or_before(stream_ns, times_ns)
    after = first_at_or_after(stream_ns, times_ns)
    valid = (before != ABSENT) & (after != ABSENT)
    valid[valid] = stream_ns[after[valid]] - stream_ns[before[valid]] <= max_gap_ns
    low, high = before[valid], after[valid]
    # Differences of integers first: the times themselves may be too large for float64.
    span = (stream_ns[high] - stream_ns[low]).astype(np.float64)
    part = (times_ns[valid] - stream_ns[low]) / np.where(span > 0, span, 1.0)
    table = np.zeros((len(times_ns), values.shape[1]), values.dtype)
    table[valid] = values[low] + part[:, None] * (values[high] - values[low])
    return table, valid


@dataclass(frozen=True)
class Clocks:
    """Holds the raw clocks of a log, whole, as each of its clips carries them in the member ``clocks.npz``.

    A log is what was recorded in one go (a segment, a scene, an episode) and may be cut into many clips; every clip
    has the clocks of all of it, so that a report on any one clip knows the rates, gaps and edges of the log.
    `times_ns` maps a stream's name to its own times [N] int64 in ns of clip time (`origin_ns` is added for the time
    of the log). They are not checked: a report is where a clock that repeats is to be seen. `kind` is "captured", or
    "synthetic" where a writer made the times. `reference` names the stream whose times the slices have.
    """

    log: str
    kind: ClockOrigin
    reference: str
    times_ns: dict[str, np.ndarray]
    origin_ns: int = 0

    def to_bytes(self) -> bytes:
        """Encode the clocks as ``.npz``, with everything but the times as JSON.

        Of each stream it holds the first time and then the intervals, since these compress.
        """
        about = {"log": self.log, "kind": self.kind, "reference": self.reference, "origin_ns": self.origin_ns}
        arrays = {_ABOUT: np.array(json.dumps(about))}
        arrays |= {name: np.diff(times, prepend=np.int64(0)) for name, times in self.times_ns.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stubs: as its flag
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = CLOCKS) -> "Clocks":
        """Decode what `to_bytes` gave; raise DataError for what is none, in which `where` names the member."""
        arrays = load_npz(data, where)
        with reading("set of clocks", where, "prepare the source again"):
            about = json.loads(str(arrays.pop(_ABOUT)))
            if any(table.dtype != np.int64 or table.ndim != 1 for table in arrays.values()):
                raise ValueError("its times are not one axis of int64 nanoseconds")
            times = {name: np.cumsum(intervals) for name, intervals in arrays.items()}
            if about["reference"] not in times:
                raise ValueError(f"it has no times of its reference {about['reference']!r}")
            return cls(times_ns=times, **about)


_ABOUT = "about.json"
