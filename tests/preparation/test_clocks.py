"""Slice alignment: the chosen indices against brute force, and every check that a clock can fail."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.config.load import validate
from mmoe.errors import ConfigError, DataError
from mmoe.preparation.clocks import (
    ABSENT,
    SkewPolicy,
    check_alignment,
    check_clock,
    exact_repeats,
    first_at_or_after,
    last_at_or_before,
    nearest,
    seconds_to_ns,
)
from mmoe.preparation.sources import SOURCES

# Far apart, and so near that readings fall on references and as near on either side.
instants = st.integers(-(10**12), 10**12) | st.integers(0, 12)
clocks = st.lists(instants, min_size=0, max_size=30, unique=True).map(
    lambda times: np.array(sorted(times), dtype=np.int64)
)
references = st.lists(instants, min_size=1, max_size=10).map(lambda times: np.array(times, dtype=np.int64))


@given(clocks, references, st.none() | st.integers(0, 10**11))
def test_choice_is_the_nearest_on_its_side(stream, reference, gap):
    limit = gap if gap is not None else np.inf
    before, after = last_at_or_before(stream, reference, gap), first_at_or_after(stream, reference, gap)
    closest = nearest(stream, reference, gap)
    for row, time in enumerate(reference.tolist()):
        past = [(time - t, i) for i, t in enumerate(stream.tolist()) if 0 <= time - t <= limit]
        future = [(t - time, i) for i, t in enumerate(stream.tolist()) if 0 <= t - time <= limit]
        assert before[row] == (min(past)[1] if past else ABSENT)
        assert after[row] == (min(future)[1] if future else ABSENT)
        # Of two as near the earlier, which stands first.
        assert closest[row] == (min(past + future)[1] if past or future else ABSENT)


def test_a_reading_at_the_reference_is_both_last_and_first():
    stream = np.array([-5, 0, 7], dtype=np.int64)
    assert last_at_or_before(stream, np.array([0])) == first_at_or_after(stream, np.array([0])) == 1


@given(st.integers(-(2**50), 2**50))
def test_seconds_of_a_recording_come_back_to_the_nanosecond(time_ns):
    assert seconds_to_ns(np.array([time_ns / 1e9]), "imu", "a.csv")[0] == time_ns


@pytest.mark.parametrize("seconds, fault", [(1_700_000_000.5, "too large"), (np.nan, "row 1"), (np.inf, "row 1")])
def test_seconds_that_cannot_be_nanoseconds_are_refused(seconds, fault):
    with pytest.raises(DataError, match=f"a.csv: stream 'imu'.*{fault}"):
        seconds_to_ns(np.array([0.0, seconds]), "imu", "a.csv")


@pytest.mark.parametrize(
    "times, fault", [([0, 5, 5], "repeats at row 2"), ([0, 5, 4, 6, 1], "backwards at row 2.*2 such")]
)
def test_a_clock_that_does_not_advance_is_named(times, fault):
    with pytest.raises(DataError, match=f"b.npy: the clock of stream 'gps' .*{fault}"):
        check_clock(np.array(times, dtype=np.int64), "gps", "b.npy")


def test_a_clock_must_be_integers():
    with pytest.raises(DataError, match="float64.*seconds_to_ns"):
        check_clock(np.array([0.0, 1.0]), "gps", "b.npy")
    good = np.array([-3, 0, 9], dtype=np.int64)
    assert check_clock(good, "gps", "b.npy") is good


def test_alignment_holds_to_the_file_within_a_millisecond():
    reference, offset = np.array([0, 10**9]), np.array([-5, -7])
    raw = reference + offset
    check_alignment(reference, offset, raw, raw + 10**6, "front", "clip.mp4")
    with pytest.raises(DataError, match="clip.mp4: slice 1 .*'front'.*1.000 ms"):
        check_alignment(reference, offset, raw, raw + np.array([0, 10**6 + 1]), "front", "clip.mp4")
    with pytest.raises(DataError, match="slice 0 .*not its raw time"):
        check_alignment(reference, offset + 1, raw, raw, "front", "clip.mp4")
    with pytest.raises(DataError, match="check the unit"):  # microseconds taken for nanoseconds
        check_alignment(reference, offset, raw, raw // 1000, "front", "clip.mp4")


def test_skew_policies_raise_keep_or_leave_out_and_count():
    offset = np.array([0, -40, 51, -60]) * 10**6
    budget = 50 * 10**6
    keep, count = SkewPolicy(budget_ns=budget, policy="flag").apply(offset, "back", "c")
    assert keep.all() and count == 2
    keep, count = SkewPolicy(budget_ns=budget, policy="drop").apply(offset, "back", "c")
    assert keep.tolist() == [True, True, False, False] and count == 2
    with pytest.raises(DataError, match="c: 2 of 4 members of stream 'back' are up to 60.0 ms"):
        SkewPolicy(budget_ns=budget, policy="strict").apply(offset, "back", "c")
    assert SkewPolicy(budget_ns=budget).apply(offset[:2], "back", "c")[1] == 0


def test_only_rows_that_repeat_in_every_value_count_as_repeats():
    times = np.array([0, 5, 5, 5, 9, 9], dtype=np.int64)
    values = np.array([[1, 2], [3, 4], [3, 4], [3, 5], [6, 6], [6, 6]])
    same = exact_repeats(times, values)
    assert same.tolist() == [False, False, True, False, False, True]
    with pytest.raises(DataError, match="repeats at row 2"):  # two values for one time are nobody's to choose from
        check_clock(times[~same], "gps", "b.npy")


@pytest.mark.real_data
def test_unix_times_of_a_real_log_survive_as_integers_and_not_as_floats(shared_data):
    """Udacity's frame times: 1.48e18 ns, where neighboring float64 are 256 ns apart."""
    lines = (shared_data / "driving_log" / "udacity_ch2" / "CH2_final_evaluation.csv").read_text().split()[1:]
    times = np.array([int(line.split(",")[0]) for line in lines], dtype=np.int64)
    assert len(times) == 5614 and check_clock(times, "front", "csv") is times
    assert (np.array([str(t) for t in times]) == [line.split(",")[0] for line in lines]).all()
    reference = times[::10] + 3
    rows = last_at_or_before(times, reference)
    check_alignment(reference, times[rows] - reference, times[rows], times[rows], "front", "csv")
    assert (reference - times[rows] == 3).all()
    lossy = times.astype(np.float64).astype(np.int64)
    assert (lossy != times).mean() > 0.9 and np.abs(lossy - times).max() > 100
    with pytest.raises(DataError, match="too large"):
        seconds_to_ns(times / 1e9, "front", "csv")


@pytest.mark.parametrize("kind", ["nuscenes", "comma2k19"])
def test_what_is_not_said_of_the_skew_stays_the_sources_own(kind):
    config = SOURCES.find(kind).config
    own = config().skew
    assert validate(config, {"skew": {"policy": "drop"}}, "x").skew == own.model_copy(update={"policy": "drop"})
    assert validate(config, {"skew": {"budget_ns": 5}}, "x").skew == own.model_copy(update={"budget_ns": 5})
    with pytest.raises(ConfigError):
        validate(config, {"skew": {"polcy": "drop"}}, "x")
