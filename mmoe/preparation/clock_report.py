"""Measures what the clocks of a source say: rates, jitter, gaps, and how each stream lies in time to the reference.

The clocks are those that every time-sliced sample carries (`mmoe.preparation.slices.Clocks`): whole logs, as recorded,
so that nothing here depends on how the logs were cut into clips, split or quarantined.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.addresses import join_address
from mmoe.config.load import validate
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.data.storage.store import DEFAULT_STORAGE, Storage
from mmoe.errors import DataError
from mmoe.preparation.clocks import nearest
from mmoe.preparation.rows import make_sample
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Refused
from mmoe.schema.manifest import SPLITS, SourceManifest

MS = 1_000_000
BURSTS = 0.05  # share of repeated times beyond which a stream comes in bursts
COMMENSURATE = 0.01  # how near a stream's rate must be to a multiple of the reference's for an offset to have a trend

SYNTHETIC = (
    "The times of this source were made by the writer of the data (row number / rate). They say nothing about when "
    "the sensors measured, so nothing below is evidence of their synchrony."
)


@dataclass(frozen=True)
class StreamTiming:
    """Holds the timing of one stream over all logs; times are in ms.

    `intervals` [N - logs] and `offsets` [references] are for histograms, with N readings.

    An interval of zero is a repeat, a negative one runs backwards; a gap is one of more than twice the median. The
    offset is that of the nearest reading to each reference that lies within the stream. `drift` is the slope of it
    in parts per million, over whole logs; None where the stream's rate is no multiple of the reference's, since the
    offset then has no trend but the beat of two rates.
    """

    name: str
    readings: int
    logs: int
    rate_hz: float | None  # None where no two readings tell
    intervals: np.ndarray
    offsets: np.ndarray
    repeats: int
    backwards: int
    gaps: int
    longest_gap: float
    within_1ms: float | None  # share of all references
    drift: float | None
    drift_ms: float | None  # over a log, the median of logs
    start: float | None  # first reading after the reference's first, the median of logs
    end: float | None

    @property
    def bursts(self) -> bool:
        """True if readings come in bursts of one time, so that intervals say nothing."""
        return self.repeats > BURSTS * max(len(self.intervals), 1)


@dataclass(frozen=True)
class ClockReport:
    """Holds the timing of a source's streams, the reference first.

    `unreadable` counts refused items of raw recordings by reason.
    """

    title: str
    kind: str  # "captured" or "synthetic"
    reference: str
    logs: int
    references: int
    streams: list[StreamTiming]
    unreadable: Counter[str]


def report_prepared(folder: str | Path, storage: Storage = DEFAULT_STORAGE) -> ClockReport:
    """Report on the clocks of a prepared source; raise DataError where no sample carries clocks."""
    manifest = SourceManifest.load(folder, storage.read)
    logs: dict[str, Clocks] = {}
    for split in filter(manifest.splits.get, SPLITS):
        for shard in manifest.splits[split].shards:
            index = ShardIndex.read(join_address(folder, shard.path), storage)
            for row in range(len(index)):
                clocks = _member(index, row, storage)
                if clocks is not None:
                    logs.setdefault(clocks.log, clocks)
    if not logs:
        raise DataError(
            f"{folder} holds no sample with {CLOCKS}, so there is no clock to report on: its kind {manifest.kind} has "
            "no time slices, or it was prepared by an earlier version (then prepare it again)"
        )
    return measure_clocks(list(logs.values()), f"{manifest.kind} in {folder}", Counter())


def report_raw(kind: str, path: Path, options: dict[str, Any] | None = None) -> ClockReport:
    """Report on the clocks of raw recordings, through their reader; raise DataError where no log can be read."""
    source = SOURCES.find(kind)
    reader = validate(source.config, options or {}, f"options of {kind}")
    unreadable: Counter[str] = Counter()
    logs: dict[str, Clocks] = {}
    first = ""

    def refuse(_: str, refusal: DataError) -> None:
        nonlocal first
        unreadable[refusal.reason if isinstance(refusal, Refused) else "unreadable recording"] += 1
        first = first or str(refusal)

    for item in source.items(path, reader, refuse):
        try:
            sample = make_sample(item)
        except DataError as refusal:
            refuse(item.key, refusal)
            continue
        if CLOCKS in sample.members:
            clocks = Clocks.from_bytes(sample.members[CLOCKS])
            logs.setdefault(clocks.log, clocks)
    if not logs:
        refused = f"; {sum(unreadable.values())} items were refused, the first: {first}" if unreadable else ""
        raise DataError(f"{path} gives no sample with a clock as {kind}{refused}; give recordings with time slices")
    return measure_clocks(list(logs.values()), f"{kind} in {path}", unreadable)


def measure_clocks(logs: list[Clocks], title: str, unreadable: Counter[str]) -> ClockReport:
    """Make the report on whole logs of one source.

    `unreadable` counts the items that were refused, by reason.
    """
    reference = logs[0].reference
    if any(log.reference != reference or log.kind != logs[0].kind for log in logs):
        raise DataError(f"{title}: its logs differ in their reference or kind of clock; prepare the source again")
    names = dict.fromkeys([reference, *(name for log in logs for name in log.times_ns)])
    return ClockReport(
        title=title,
        kind=logs[0].kind,
        reference=reference,
        logs=len(logs),
        references=sum(len(log.times_ns[reference]) for log in logs),
        streams=[_timing(name, logs) for name in names],
        unreadable=unreadable,
    )


def _member(index: ShardIndex, row: int, storage: Storage) -> Clocks | None:
    for member in range(index.row_members(row)):
        if index.row_member(row, member)[0] == CLOCKS:
            stored = read_stored(index, row, member, storage)
            return Clocks.from_bytes(stored.content, stored.where)
    return None


def _timing(name: str, logs: list[Clocks]) -> StreamTiming:
    held = [log for log in logs if len(log.times_ns.get(name, ()))]
    intervals = np.concatenate([np.zeros(0, np.int64), *(np.diff(log.times_ns[name]) for log in held)])
    # In order of time: a clock that runs backwards is counted, and must not spoil the choice of the nearest.
    pairs = [(log.times_ns[log.reference], np.sort(log.times_ns[name])) for log in held]
    span_s = sum(int(times[-1] - times[0]) for _, times in pairs) / 1e9
    rate = len(intervals) / span_s if span_s else None
    offsets, near = [np.zeros(0, np.int64)], 0
    for reference_ns, times_ns in pairs:
        offset = times_ns[nearest(times_ns, reference_ns)] - reference_ns
        near += int((np.abs(offset) <= MS).sum())
        offsets.append(offset[(reference_ns >= times_ns[0]) & (reference_ns <= times_ns[-1])])
    forward = intervals[intervals > 0]
    long = intervals[intervals > 2 * np.median(forward)] if len(forward) else forward
    slopes = [slope for log in held if (slope := _slope(log, name)) is not None]
    references = sum(len(log.times_ns[log.reference]) for log in logs)
    return StreamTiming(
        name=name,
        readings=sum(len(times) for _, times in pairs),
        logs=len(held),
        rate_hz=rate,
        intervals=intervals / MS,
        offsets=np.concatenate(offsets) / MS,
        repeats=int((intervals == 0).sum()),
        backwards=int((intervals < 0).sum()),
        gaps=len(long),
        longest_gap=float(long.max(initial=0)) / MS,
        within_1ms=near / references if references else None,
        drift=float(np.median([slope for slope, _ in slopes])) if slopes else None,
        drift_ms=float(np.median([drift for _, drift in slopes])) if slopes else None,
        start=_median_ms([int(times[0] - reference[0]) for reference, times in pairs if len(reference)]),
        end=_median_ms([int(times[-1] - reference[-1]) for reference, times in pairs if len(reference)]),
    )


def _median_ms(times_ns: list[int]) -> float | None:
    return float(np.median(times_ns)) / MS if times_ns else None


def _slope(log: Clocks, name: str) -> tuple[float, float] | None:
    """Trend of the offset: parts per million, and ms over the log; None where it has none or three points at most."""
    reference_ns, times_ns = log.times_ns[log.reference], log.times_ns[name]
    if name == log.reference or len(reference_ns) < 4 or len(times_ns) < 4 or (np.diff(times_ns) <= 0).any():
        return None
    ratio = np.median(np.diff(reference_ns)) / np.median(np.diff(times_ns))
    if round(ratio) < 1 or abs(ratio / round(ratio) - 1) > COMMENSURATE:
        return None
    inside = reference_ns[(reference_ns >= times_ns[0]) & (reference_ns <= times_ns[-1])]
    if len(inside) < 4:
        return None
    offset = times_ns[nearest(times_ns, inside)] - inside
    # A drift beyond half an interval meets the next reading; unwrapped, it goes on.
    offset = np.unwrap(offset.astype(np.float64), period=float(np.median(np.diff(times_ns))))
    slope = np.polyfit((inside - inside[0]) / 1e9, offset / 1e9, 1)[0]
    return slope * 1e6, slope * float(inside[-1] - inside[0]) / MS


def quantiles(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Return least, first percentile, median, 99th percentile and greatest of one value or more."""
    return tuple(np.quantile(values, (0, 0.01, 0.5, 0.99, 1)).tolist())


def text(value: float | None, digits: int, sign: str = "") -> str:
    """Format a measure as a report shows it; a dash where there is none, which is not zero."""
    return "-" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # adding zero turns -0.0 into 0.0


COLUMNS = (
    "stream",
    "rate Hz",
    "readings",
    "interval ms median (p1..p99)",
    "jitter sd ms",
    "gaps (longest ms)",
    "within 1 ms",
    "offset ms min/p1/median/p99/max",
    "drift ppm (ms)",
    "start ms",
    "end ms",
    "remarks",
)


def report_rows(report: ClockReport) -> list[tuple[str, ...]]:
    """Return a line of text for each stream of a report, with a cell for each of `COLUMNS`."""
    lines: list[tuple[str, ...]] = []
    for stream in report.streams:
        intervals, jitter, gaps = "-", "-", "-"
        if len(stream.intervals):
            _, low, median, high, _ = quantiles(stream.intervals)
            intervals, jitter = f"{median:.2f} ({low:.2f}..{high:.2f})", f"{stream.intervals.std():.3f}"
            gaps = f"{stream.gaps:,} ({stream.longest_gap:.1f})" if stream.gaps else "0"
        offsets = quantiles(stream.offsets) if len(stream.offsets) else ()
        remarks = ["reference"] if stream.name == report.reference else []
        remarks += ["in bursts"] if stream.bursts else []
        remarks += [f"{stream.repeats:,} repeated times"] if stream.repeats else []
        remarks += [f"{stream.backwards:,} times run backwards"] if stream.backwards else []
        remarks += [f"absent in {report.logs - stream.logs} of {report.logs} logs"] if stream.logs < report.logs else []
        drift = "-" if stream.drift is None else f"{text(stream.drift, 1)} ({text(stream.drift_ms, 2)})"
        lines.append(
            (
                stream.name,
                text(stream.rate_hz, 3),
                f"{stream.readings:,}",
                intervals,
                jitter,
                "-" if stream.bursts else gaps,
                "-" if stream.within_1ms is None else f"{stream.within_1ms:.1%}",
                "/".join(text(value, 1) for value in offsets) or "-",
                drift,
                text(stream.start, 1, "+"),
                text(stream.end, 1, "+"),
                ", ".join(remarks),
            )
        )
    return lines
