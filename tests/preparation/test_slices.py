"""The slice builder against brute force: what every slice holds, what is absent, and that all of it is counted."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.errors import Refused
from mmoe.preparation import slices
from mmoe.preparation.clocks import SkewPolicy
from mmoe.preparation.slices import Clocks, SensorStream, Texts, build_slices, held, interpolated
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera

MS = 1_000_000
KEEP = SkewPolicy(budget_ns=10**18, policy="flag")
# Around unix time in ns as well, where float64 knows 256 ns only.
starts = st.sampled_from([0, -(10**12), 1_479_425_441_182_877_835])


def clock(size):
    return st.lists(st.integers(0, 2000), min_size=size[0], max_size=size[1], unique=True).map(
        lambda times: np.array(sorted(times), dtype=np.int64)
    )


def stream(modality, times, choice, gap, **fields):
    member = fields.pop("member", f"{modality.name.lower()}.npy")
    return SensorStream(modality.name, modality, times, member, gap, choice, **fields)


def expected(times, reference, choice, gap):
    """The reading of one slice by looking at all of them, None where it is absent."""
    allowed = [
        (abs(t - reference), t, i)
        for i, t in enumerate(times)
        if (choice == "nearest" or (t <= reference if choice == "last" else t >= reference))
        and (gap is None or abs(t - reference) <= gap)
    ]
    return min(allowed)[2] if allowed else None


@given(
    starts,
    clock((1, 8)),
    st.lists(
        st.tuples(
            st.sampled_from([Modality.VISION, Modality.INERTIAL, Modality.STATE, Modality.ACTION]),
            clock((0, 12)),
            st.sampled_from(["last", "nearest", "first"]),
            st.none() | st.integers(0, 300),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda stream: stream[0],
    ),
    st.integers(1, 4),
)
def test_slices_hold_what_brute_force_finds(start, reference, drawn, window):
    reference = start + reference
    streams = [stream(kind, start + times, choice, gap, window=window) for kind, times, choice, gap in drawn]
    built = build_slices(reference, streams, KEEP, "log")
    segments = iter(built.segments)
    number, flags = 0, Counter()
    for time in reference.tolist():
        found = {
            s.modality: (s, row)
            for s in streams
            if (row := expected(s.times_ns.tolist(), time, s.choice, s.max_gap_ns)) is not None
        }
        for s in streams:
            if s.modality not in found:
                times = s.times_ns
                inside = len(times) and times[0] <= time <= times[-1]
                flags[s.name] += 1
                what = slices.BEYOND_GAP if inside else slices.EDGE if len(times) else slices.MISSING
                assert f"{s.name}: {what}" in built.flags
        if set(found) <= {Modality.ACTION}:
            flags["slice"] += 1
            continue
        kinds = []
        for _ in found:
            segment = next(segments)
            kinds.append(segment.modality)
            s, row = found[segment.modality]
            raw = int(s.times_ns[row])
            assert (segment.slice, segment.timestamp_ns) == (number, time)
            assert segment.timestamp_ns + segment.offset_ns == raw
            assert s.choice != "last" or segment.offset_ns <= 0
            assert s.choice != "first" or segment.offset_ns >= 0
            assert s.max_gap_ns is None or abs(segment.offset_ns) <= s.max_gap_ns
            if s.modality is Modality.ACTION:
                assert (segment.start, segment.stop) == (row, len(s.times_ns))
            else:
                assert (segment.start, segment.stop) == (max(row + 1 - window, 0), row + 1)
        rank = {Modality.VISION: 0, Modality.ACTION: 2}
        assert kinds == sorted(found, key=lambda kind: rank.get(kind, 1))  # else in the order of the streams
        number += 1
    assert next(segments, None) is None
    counted = Counter()
    for flag, count in built.flags.items():
        counted[flag.partition(":")[0]] += count
    assert counted == flags


def camera(name, times, **fields):
    names = [f"{name.name.lower()}-{i}.jpg" for i in range(len(times))]
    defaults = {"max_gap_ns": 60 * MS, "size": (4, 6)}
    return SensorStream(name.name, Modality.VISION, np.array(times, np.int64), names, camera=name, **defaults | fields)


REFERENCE = np.arange(4, dtype=np.int64) * 100 * MS


def test_a_camera_that_stops_is_absent_afterwards_and_counted():
    built = build_slices(
        REFERENCE, [camera(Camera.FRONT, REFERENCE), camera(Camera.BACK, REFERENCE[:2] - 5 * MS)], KEEP, "log"
    )
    by_camera = {c: [s.slice for s in built.segments if s.camera == c] for c in (Camera.FRONT, Camera.BACK)}
    assert by_camera == {Camera.FRONT: [0, 1, 2, 3], Camera.BACK: [0, 1]}
    assert built.flags == {f"BACK: {slices.EDGE}": 2}


def test_a_camera_that_the_recording_lacks_is_counted_as_such():
    built = build_slices(REFERENCE, [camera(Camera.FRONT, REFERENCE), camera(Camera.BACK, [])], KEEP, "log")
    assert {s.camera for s in built.segments} == {Camera.FRONT}
    assert built.flags == {f"BACK: {slices.MISSING}": 4}


@pytest.mark.parametrize("policy, slices_of_back", [("flag", [0, 1, 2, 3]), ("drop", [0, 1, 3])])
def test_the_skew_policy_keeps_or_drops_and_counts(policy, slices_of_back):
    late = camera(Camera.BACK, REFERENCE - np.array([5, 10, 50, 9]) * MS)
    streams = [camera(Camera.FRONT, REFERENCE), late]
    built = build_slices(REFERENCE, streams, SkewPolicy(budget_ns=10 * MS, policy=policy), "log")
    assert [s.slice for s in built.segments if s.camera == Camera.BACK] == slices_of_back
    assert built.flags == {f"BACK: {slices.SKEW_KEPT if policy == 'flag' else slices.SKEW_LEFT_OUT}": 1}


def test_the_skew_budget_is_of_captured_members_alone():
    streams = [camera(Camera.FRONT, REFERENCE), stream(Modality.STATE, REFERENCE - 40 * MS, "last", 60 * MS)]
    assert not build_slices(REFERENCE, streams, SkewPolicy(budget_ns=MS), "log").flags
    streams[0] = camera(Camera.FRONT, REFERENCE - 2 * MS)
    with pytest.raises(Refused, match="log: 4 of 4 members of stream 'FRONT'.*2.0 ms") as refusal:
        build_slices(REFERENCE, streams, SkewPolicy(budget_ns=MS), "log")
    assert pickle.loads(pickle.dumps(refusal.value)).reason == slices.BAD_CLOCK


def test_a_reading_that_is_not_at_its_file_s_time_is_refused():
    """Microseconds taken for nanoseconds, found by the time that the file states."""
    wrong = camera(Camera.FRONT, REFERENCE, file_ns=REFERENCE * 1000)
    with pytest.raises(Refused, match="slice 3 of stream 'FRONT'.*check the unit"):
        build_slices(REFERENCE, [wrong], KEEP, "log")
    build_slices(REFERENCE, [camera(Camera.FRONT, REFERENCE, file_ns=REFERENCE + MS)], KEEP, "log")


@pytest.mark.parametrize("times", [[0, 0, 5], [0, 9, 5]])
def test_clocks_that_do_not_advance_are_refused(times):
    for reference, own in ((REFERENCE[:3], np.array(times)), (np.array(times), REFERENCE[:3])):
        with pytest.raises(Refused, match="log: the clock of stream .*(repeats|backwards)"):
            build_slices(reference, [camera(Camera.FRONT, own)], KEEP, "log")


def test_texts_pair_with_the_images_of_their_slice_also_after_an_empty_one():
    texts = Texts("clip.json", [f"text {i}" for i in range(4)])
    built = build_slices(REFERENCE, [camera(Camera.FRONT, REFERENCE[1:])], KEEP, "log", texts)
    assert [(s.modality, s.slice, s.pair, s.timestamp_ns) for s in built.segments] == [
        (kind, i, i, (i + 1) * 100 * MS) for i in range(3) for kind in (Modality.VISION, Modality.TEXT)
    ]
    assert [s.text for s in built.segments if s.text] == ["text 1", "text 2", "text 3"]
    assert built.flags == {f"FRONT: {slices.EDGE}": 1, f"slice: {slices.UNOBSERVED}": 1}
    alone = build_slices(
        REFERENCE, [camera(Camera.FRONT, REFERENCE)], KEEP, "log", Texts("t", texts.texts, paired=False)
    )
    assert {s.pair for s in alone.segments} == {-1}


@given(starts, clock((2, 12)), clock((1, 8)), st.integers(0, 500))
def test_held_values_are_never_of_the_future_nor_too_old(start, times, wanted, gap):
    values = np.arange(len(times), dtype=np.float64)[:, None]
    table, valid = held(start + wanted, start + times, values, gap)
    for time, row, ok in zip(wanted.tolist(), table[:, 0], valid):
        index = expected(times.tolist(), time, "last", gap)
        assert ok == (index is not None) and (not ok or row == index)


@given(starts, clock((2, 12)), clock((1, 8)), st.integers(0, 2000))
def test_interpolation_equals_numpy_s_within_the_gap(start, times, wanted, gap):
    values = np.stack([np.sin(times), times * 2.0], axis=1)
    table, valid = interpolated(start + wanted, start + times, values, gap)
    for column in range(2):
        by_numpy = np.interp(wanted[valid], times, values[:, column])
        np.testing.assert_allclose(table[valid, column], by_numpy, rtol=1e-9, atol=1e-9)
    for time, ok in zip(wanted.tolist(), valid):
        before, after = (expected(times.tolist(), time, choice, None) for choice in ("last", "first"))
        assert ok == (before is not None and after is not None and times[after] - times[before] <= gap)


@given(starts, clock((1, 30)))
def test_clocks_come_back_from_the_member_as_they_were(start, times):
    backwards = (start + times)[::-1]
    clocks = Clocks("log|1", "captured", "front", {"front": start + times, "CAN/radar": backwards}, origin_ns=start)
    again = Clocks.from_bytes(clocks.to_bytes())
    assert (again.log, again.kind, again.reference, again.origin_ns) == ("log|1", "captured", "front", start)
    assert list(again.times_ns) == ["front", "CAN/radar"]
    assert all((again.times_ns[name] == clocks.times_ns[name]).all() for name in again.times_ns)
    assert clocks.to_bytes() == again.to_bytes()
