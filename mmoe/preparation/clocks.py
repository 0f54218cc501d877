"""Chooses each slice's members by time (signed int64 nanoseconds), and makes the two checks on that choice.

*Alignment* is bookkeeping: reference + offset must be the reader's raw time, and that must be the file's time
to 1 ms. *Skew* is |offset| of captured members (frames, audio) against the budget their source declares. Held
streams (inertial, speed) have a maximum gap instead: a reading older than that is absent, not stale.

R: references, N: readings of a stream, D: dimensions of a reading.
"""

from typing import Any, Literal

import numpy as np
from pydantic import BeforeValidator

from mmoe.config.base import Config
from mmoe.errors import DataError
from mmoe.schema.sample import ALIGNMENT_NS

ABSENT = -1
SECOND_NS = 1_000_000_000

# float64 seconds beyond this (104 days) are off by more than 2 ns; unix seconds are 238 ns apart.
_EXACT_SECONDS = 2.0**53 / SECOND_NS


def seconds_to_ns(seconds: np.ndarray, stream: str, file: str) -> np.ndarray:
    """Convert the seconds [N] of a file to int64 nanoseconds [N], rounded once.

    `stream` and `file` are for messages. Raises DataError for a value that is not finite, or so large (unix time) that
    float64 cannot hold it.
    """
    seconds = np.asarray(seconds, dtype=np.float64)
    if not np.isfinite(seconds).all():
        row = int(np.flatnonzero(~np.isfinite(seconds))[0])
        raise DataError(f"{file}: stream {stream!r} has no finite time at row {row}; repair or drop that row")
    if np.abs(seconds).max(initial=0.0) >= _EXACT_SECONDS:
        raise DataError(
            f"{file}: stream {stream!r} holds float seconds up to {np.abs(seconds).max():.0f}, too large to keep "
            "nanoseconds; read the digits as integers, or subtract the recording's start before writing floats"
        )
    return np.rint(seconds * SECOND_NS).astype(np.int64)


def check_clock(times_ns: np.ndarray, stream: str, file: str) -> np.ndarray:
    """Return a stream's clock [N] unchanged if it is int64 and strictly increasing; else raise DataError."""
    if times_ns.dtype != np.int64 or times_ns.ndim != 1:
        raise DataError(
            f"{file}: the clock of stream {stream!r} is {times_ns.dtype} with {times_ns.ndim} axes; it must be one "
            "axis of int64 nanoseconds (convert with `seconds_to_ns`)"
        )
    wrong = np.flatnonzero(times_ns[1:] <= times_ns[:-1])
    if len(wrong):
        row = int(wrong[0]) + 1
        fault = "repeats" if times_ns[row] == times_ns[row - 1] else "runs backwards"
        raise DataError(
            f"{file}: the clock of stream {stream!r} {fault} at row {row} ({times_ns[row - 1]} ns, then "
            f"{times_ns[row]} ns; {len(wrong)} such rows); sort the stream and remove double readings"
        )
    return times_ns


def exact_repeats(times_ns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mark the rows [N] (bool) that equal the row before them in time [N] and in every value [N, D].

    These may be dropped without loss. What repeats in time alone is for `check_clock` to refuse: one of the two
    readings is wrong, and nothing says which.
    """
    same = np.zeros(len(times_ns), dtype=bool)
    same[1:] = (times_ns[1:] == times_ns[:-1]) & (values[1:] == values[:-1]).all(axis=1)
    return same


def last_at_or_before(stream_ns: np.ndarray, reference_ns: np.ndarray, max_gap_ns: int | None = None) -> np.ndarray:
    """Return the index [R] of the last reading at or before each reference, ABSENT where none is (within the gap).

    `stream_ns` [N] must be increasing. This is the causal choice: it never reads the future.
    """
    index = np.searchsorted(stream_ns, reference_ns, side="right") - 1
    return _within_gap(stream_ns, reference_ns, index, max_gap_ns)


def first_at_or_after(stream_ns: np.ndarray, reference_ns: np.ndarray, max_gap_ns: int | None = None) -> np.ndarray:
    """Return the index [R] of the first reading at or after each reference, ABSENT where none is (within the gap)."""
    index = np.searchsorted(stream_ns, reference_ns, side="left")
    return _within_gap(stream_ns, reference_ns, np.where(index < len(stream_ns), index, ABSENT), max_gap_ns)


def nearest(stream_ns: np.ndarray, reference_ns: np.ndarray, max_gap_ns: int | None = None) -> np.ndarray:
    """Return the index [R] of the reading nearest to each reference, ABSENT where none is (within the gap).

    Of two readings as near it is the earlier. It may lie in the future of the reference: not for what an action is
    predicted from.
    """
    after = np.searchsorted(stream_ns, reference_ns, side="left")
    if not len(stream_ns):
        return np.full(len(reference_ns), ABSENT)
    before, after = np.maximum(after - 1, 0), np.minimum(after, len(stream_ns) - 1)
    later = np.abs(stream_ns[after] - reference_ns) < np.abs(reference_ns - stream_ns[before])
    return _within_gap(stream_ns, reference_ns, np.where(later, after, before), max_gap_ns)


def _within_gap(
    stream_ns: np.ndarray, reference_ns: np.ndarray, index: np.ndarray, max_gap_ns: int | None
) -> np.ndarray:
    if max_gap_ns is None or not len(stream_ns):
        return index
    return np.where(np.abs(stream_ns[index] - reference_ns) <= max_gap_ns, index, ABSENT)


def check_alignment(
    reference_ns: np.ndarray,
    offset_ns: np.ndarray,
    raw_ns: np.ndarray,
    file_ns: np.ndarray,
    stream: str,
    file: str,
) -> None:
    """Raise DataError unless reference + offset == raw time exactly, and raw time is the file's to 1 ms ([R] each).

    `raw_ns` is what the reader believes; `file_ns` is what the file itself says after conversion to the same
    clock (a container's frame times, a log's seconds). This finds ms/us mix-ups and lost float digits.
    """
    wrong = np.flatnonzero(reference_ns + offset_ns != raw_ns)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{file}: slice {row} of stream {stream!r} has reference {reference_ns[row]} ns + offset "
            f"{offset_ns[row]} ns, not its raw time {raw_ns[row]} ns; derive the offset from those two in the reader"
        )
    error_ns = np.abs(raw_ns - file_ns)
    if error_ns.max(initial=0) > ALIGNMENT_NS:
        row = int(error_ns.argmax())
        raise DataError(
            f"{file}: slice {row} of stream {stream!r} is {error_ns[row] / 1e6:.3f} ms from the time in the file "
            f"(limit {ALIGNMENT_NS / 1e6:.0f} ms); check the unit and the start of that clock"
        )


class SkewPolicy(Config):
    """Says what happens to captured members further from the reference than the source's budget."""

    budget_ns: int  # that a member may be from the reference
    # strict: error; flag: keep and count; drop: leave the member out of its slice and count.
    policy: Literal["strict", "flag", "drop"] = "strict"

    def apply(self, offset_ns: np.ndarray, stream: str, file: str) -> tuple[np.ndarray, int]:
        """Return which members [R] (bool) stay, and how many exceed the budget; raise DataError under ``strict``.

        `offset_ns` [R] is the member's time less the reference's; `stream` and `file` are for messages.
        """
        beyond = np.abs(offset_ns) > self.budget_ns
        count = int(beyond.sum())
        if count and self.policy == "strict":
            worst = np.abs(offset_ns).max()
            raise DataError(
                f"{file}: {count} of {len(offset_ns)} members of stream {stream!r} are up to {worst / 1e6:.1f} ms from "
                f"their reference, the budget is {self.budget_ns / 1e6:.1f} ms; raise the source's skew budget, or "
                "choose the policy flag or drop"
            )
        return (~beyond if self.policy == "drop" else np.ones_like(beyond)), count


def completed_from(default: SkewPolicy) -> BeforeValidator:
    """Annotate a reader's option `skew` so that what is not given stays as in `default`, the source's own."""

    def complete(given: Any) -> Any:
        return {**default.model_dump(), **given} if isinstance(given, dict) else given

    return BeforeValidator(complete)
