"""comma2k19: the real segment, and written ones whose values tell their own time."""

import io

import numpy as np
import pytest
from PIL import Image

from mmoe.errors import DataError
from mmoe.preparation import slices
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.comma2k19 import PERIOD_NS
from mmoe.preparation.splits import GAP_NS, split_recordings
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from tests.data.recordings import images
from tests.data.recordings_driving import BOOT_S, write_segment
from tests.preparation.sources.test_sources import read

MS = 1_000_000
REAL = "comma2k19_b0c9d2329ad1606b_2018-08-02--08-34-47_40"


def array(sample, member):
    return np.load(io.BytesIO(sample.members[member]))


def of(sample, modality):
    return [s for s in sample.segments if s.modality is modality]


def check_values(samples):
    """In a written segment every value is a function of the time at which it was read."""
    for sample in samples:
        origin = Clocks.from_bytes(sample.members[CLOCKS]).origin_ns / 1e9 - BOOT_S
        for segment in of(sample, Modality.STATE):
            speed, steering = array(sample, segment.member)[segment.start]
            raw = (segment.timestamp_ns + segment.offset_ns) / 1e9 + origin
            assert segment.offset_ns <= 0 and speed == pytest.approx(10 + raw, abs=1e-5)
            assert 0 <= raw + steering <= 0.021  # what was held then is no later, and as fresh as 12 ms with jitter
        for segment in of(sample, Modality.INERTIAL):
            window = array(sample, segment.member)[segment.start : segment.stop]
            raw = (segment.timestamp_ns + segment.offset_ns) / 1e9 + origin
            assert -10 * MS < segment.offset_ns <= 0 and window[-1] == pytest.approx([raw] * 3 + [-raw] * 3, abs=1e-5)
            assert len(window) == 10 or segment.timestamp_ns / 1e9 + origin < 0.15
        for segment in of(sample, Modality.ACTION):
            table = array(sample, segment.member)[segment.start : segment.stop]
            # One step after the frame, held: never before what the step began with.
            at = segment.timestamp_ns / 1e9 + origin + 0.05 * (1 + np.arange(len(table)))
            assert segment.offset_ns == 0
            for values in (-table[:, 0], table[:, 1] - 10):
                assert ((values <= at + 1e-5) & (values >= at - 0.05)).all()


def test_every_value_is_of_its_time_and_never_of_the_future(tmp_path):
    write_segment(tmp_path / "b0|2018-08-02" / "7")
    samples, refused = read("comma2k19", tmp_path, slices=3, lookahead=8)
    assert not refused and {s.recording for s in samples.values()} == {"b0_2018-08-02"}
    assert list(samples) == [f"b0_2018-08-02-7-{row:06d}" for row in (0, 30, 60, 90)]
    check_values(samples.values())
    first, *_, last = samples.values()
    # The video starts before bus and inertial unit: nothing was observed yet at its first frame.
    assert first.flags[f"slice: {slices.UNOBSERVED}"] == first.flags[f"state: {slices.EDGE}"] == 1
    assert [s.timestamp_ns for s in of(first, Modality.STATE)] == [500 * MS, 1000 * MS]
    assert all(sample.flags[f"front: {slices.MISSING}"] == 3 for sample in samples.values())
    for sample in list(samples.values())[1:-1]:
        assert of(sample, Modality.ACTION)[-1].stop - of(sample, Modality.ACTION)[-1].start == 10 + 8
    # The recording ends 10 frames after its last slice: a longer chunk is masked from there on.
    segment = of(last, Modality.ACTION)[-1]
    stats = VectorStats(names=("a", "b"), mean=(0, 0), std=(1, 1), q01=(-1, -1), q99=(1, 1), period_ns=PERIOD_NS)
    tokenizer = ActionTokenizer(ActionConfig(chunk=16), stats)
    _, mask = tokenizer.chunk_of(array(last, segment.member), segment.start, segment.stop)
    assert mask[:, 0].tolist() == [True] * 10 + [False] * 6


def test_what_train_clips_read_ahead_ends_before_the_held_out_tail(tmp_path):
    write_segment(tmp_path / "d" / "1", seconds=30)
    source = SOURCES.find("comma2k19")
    items = list(source.items(tmp_path, source.config(lookahead=30), lambda *_: None))
    sides = split_recordings(items, 0.3, GAP_NS)
    assert sides.train and sides.gap
    begin = min(item.start for item in sides.heldout)
    for item in sides.train:
        sample = item.make()
        end = max(s.timestamp_ns + (s.stop - s.start) * PERIOD_NS for s in of(sample, Modality.ACTION))
        assert Clocks.from_bytes(sample.members[CLOCKS]).origin_ns + end <= begin - 400 * MS
    with pytest.raises(ValueError, match="lookahead"):
        source.config(lookahead=31)


def test_images_are_the_frames_of_the_video_at_their_times(tmp_path):
    write_segment(tmp_path / "d" / "1", seconds=2.0, with_video=True)
    samples, refused = read("comma2k19", tmp_path, slices=2)
    assert not refused
    raw = images(40).astype(int)
    for sample in samples.values():
        first = int(sample.key[-6:])
        for segment in of(sample, Modality.VISION):
            row = first + round(segment.timestamp_ns / PERIOD_NS)
            image = np.array(Image.open(io.BytesIO(sample.members[segment.member]))).astype(int)
            assert (segment.height, segment.width, segment.offset_ns) == (48, 64, 0) == (*image.shape[:2], 0)
            assert segment.camera == Camera.FRONT
            errors = np.abs(raw - image).mean(axis=(1, 2, 3))
            assert errors.argmin() == row
    assert sum(len(of(sample, Modality.VISION)) for sample in samples.values()) == 4
    assert not any("front" in flag for sample in samples.values() for flag in sample.flags)


def test_a_video_with_other_frames_than_times_is_refused(tmp_path):
    write_segment(tmp_path / "d" / "1", seconds=1.0, with_video=True)
    write_segment(tmp_path / "d" / "1", seconds=1.05)
    samples, refused = read("comma2k19", tmp_path)
    assert not samples and {r.reason for r in refused.values()} == {slices.BAD_CLOCK}
    assert "video.hevc has 20 frames" in str(next(iter(refused.values())))


def backwards(times, values):
    times[40:42] = times[40:42][::-1].copy()
    return times, values


def twice(times, values):
    return np.repeat(times, 2)[: len(times)], np.arange(len(times), dtype=float).reshape(values.shape)


def unix(times, values):
    return times + 1.5e9, values


@pytest.mark.parametrize("log", ["frames", "speed", "gyro"])
@pytest.mark.parametrize("fault, says", [(backwards, "runs backwards at row 41"), (unix, "too large")])
def test_clocks_that_cannot_be_are_refused_with_the_file_named(tmp_path, log, fault, says):
    write_segment(tmp_path / "d" / "1", **{log: fault})
    samples, refused = read("comma2k19", tmp_path)
    assert not samples and {r.reason for r in refused.values()} == {slices.BAD_CLOCK}
    for refusal in refused.values():
        assert says in str(refusal) and (log if log != "frames" else "frame_times") in str(refusal)


def test_exact_repeats_are_refused_unless_they_may_be_dropped_and_then_counted(tmp_path):
    def repeat(times, values):
        at = np.sort(np.r_[np.arange(len(times)), 100, 300])
        return times[at], values[at]

    write_segment(tmp_path / "d" / "1", speed=repeat)
    samples, refused = read("comma2k19", tmp_path)
    assert not samples and all("repeats at row 101" in str(r) for r in refused.values())
    samples, refused = read("comma2k19", tmp_path, repeats="drop")
    assert not refused and sum(s.flags[f"speed: {slices.REPEATED}"] for s in samples.values()) == 2
    check_values(samples.values())
    write_segment(tmp_path / "d" / "1", speed=twice)  # one time, two values: dropping would choose
    assert not read("comma2k19", tmp_path, repeats="drop")[0]


def test_a_bus_that_pauses_is_absent_not_stale(tmp_path):
    def pause(times, values):
        keep = (times < BOOT_S + 2.2) | (times > BOOT_S + 3.2)
        return times[keep], values[keep]

    write_segment(tmp_path / "d" / "1", speed=pause)
    samples, _ = read("comma2k19", tmp_path, slices=20)
    (sample,) = samples.values()
    times = {s.timestamp_ns // MS for s in of(sample, Modality.STATE)}
    assert {2500, 3000} & times == set() and {2000, 3500} <= times
    assert sample.flags[f"state: {slices.BEYOND_GAP}"] == 2
    assert max(s.timestamp_ns for s in of(sample, Modality.ACTION)) == 2000 * MS  # and its table ends there
    check_values([sample])


def test_clips_are_cut_where_frames_are_missing(tmp_path):
    write_segment(tmp_path / "d" / "1", frames=lambda times, _: (np.delete(times, slice(45, 52)), None))
    samples, refused = read("comma2k19", tmp_path, slices=20)
    assert not refused and [key[-6:] for key in samples] == ["000000", "000045"]
    check_values(samples.values())


def test_without_causality_values_lie_on_the_line_through_their_neighbors(tmp_path):
    write_segment(tmp_path / "d" / "1")
    samples, _ = read("comma2k19", tmp_path, causal=False)
    for sample in samples.values():
        origin = Clocks.from_bytes(sample.members[CLOCKS]).origin_ns / 1e9 - BOOT_S
        for segment in of(sample, Modality.STATE):
            at = segment.timestamp_ns / 1e9 + origin
            assert segment.offset_ns == 0
            assert array(sample, segment.member)[segment.start] == pytest.approx([10 + at, -at], abs=1e-5)


def test_a_log_that_is_missing_or_has_another_shape_is_refused(tmp_path):
    write_segment(tmp_path / "d" / "1", gyro=lambda times, values: (times, values[:, :2]))
    write_segment(tmp_path / "d" / "2", speed=lambda times, values: (times[:-1], values))
    write_segment(tmp_path / "d" / "3")
    (tmp_path / "d" / "3" / "processed_log" / "CAN" / "speed" / "t").unlink()
    samples, refused = read("comma2k19", tmp_path)
    assert not samples
    assert {key[:3]: refusal.reason for key, refusal in refused.items()} == {
        "d-1": "unreadable log",
        "d-2": "unreadable log",
        "d-3": "missing file",
    }
    with pytest.raises(DataError, match="no comma2k19 segment"):
        read("comma2k19", tmp_path / "d" / "3" / "processed_log")


@pytest.mark.real_data
def test_the_real_segment_makes_aligned_slices_without_video(shared_data):
    folder = shared_data / "driving_log" / REAL
    samples, refused = read("comma2k19", folder)
    assert not refused and len(samples) == 15 and {s.recording for s in samples.values()} == {REAL}
    can = np.load(folder / "processed_log" / "CAN" / "speed" / "t")
    speed = np.load(folder / "processed_log" / "CAN" / "speed" / "value")[:, 0]
    flags = sum((sample.flags for sample in samples.values()), start=type(next(iter(samples.values())).flags)())
    assert flags == {
        f"front: {slices.MISSING}": 120,
        f"imu: {slices.EDGE}": 1,
        f"state: {slices.EDGE}": 1,
        f"slice: {slices.UNOBSERVED}": 1,
    }
    for sample in samples.values():
        origin = Clocks.from_bytes(sample.members[CLOCKS]).origin_ns
        for segment in of(sample, Modality.STATE):
            row = np.searchsorted(can, (origin + segment.timestamp_ns) / 1e9, side="right") - 1
            assert array(sample, segment.member)[segment.start, 0] == pytest.approx(speed[row], rel=1e-6)
            assert abs(origin + segment.timestamp_ns + segment.offset_ns - can[row] * 1e9) < 10
            assert -30 * MS < segment.offset_ns <= 0
