"""nuScenes in its raw layout: which key frames make a slice, from when they are, and what is refused."""

import io
from collections import Counter

import numpy as np
import pytest

from mmoe.errors import DataError
from mmoe.preparation import slices
from mmoe.preparation.clocks import SkewPolicy
from mmoe.preparation.prepare import prepare
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources.nuscenes import CAMERAS
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera
from mmoe.tokenizers.text import TextConfig
from tests.data.recordings_driving import SPEED, START_US, SWEEP_US, YAW_RATE, write_nuscenes
from tests.preparation.sources.test_sources import read

MS = 1_000_000


def array(sample, member):
    return np.load(io.BytesIO(sample.members[member]))


def of(sample, modality):
    return [s for s in sample.segments if s.modality is modality]


def flags(samples):
    """All flags but the one that every scene has: no ego pose precedes its first key frame by 0.1 s."""
    total = sum((sample.flags for sample in samples.values()), start=Counter())
    assert total.pop(f"state: {slices.EDGE}") == len({sample.recording for sample in samples.values()})
    return total


def test_a_slice_is_one_sweep_of_six_cameras_and_none_of_it_is_of_the_future(tmp_path):
    tables = write_nuscenes(tmp_path)
    samples, refused = read("nuscenes", tmp_path)
    assert not refused and list(samples) == [f"scene-000{i}-{at:03d}" for i in (0, 1) for at in (0, 4)]
    files = {row["timestamp"]: row["filename"] for row in tables["sample_data"]}
    for sample in samples.values():
        origin = Clocks.from_bytes(sample.members[CLOCKS]).origin_ns
        by_slice = {}
        for segment in of(sample, Modality.VISION):
            by_slice.setdefault(segment.slice, []).append(segment)
            channel = next(name for name, camera in CAMERAS.items() if camera == segment.camera)
            assert segment.offset_ns == (SWEEP_US[channel] - SWEEP_US["CAM_BACK_LEFT"]) * 1000 <= 0
            # The very file whose row, or name, has this time: digits that a float64 would have lost.
            time_us, rest = divmod(origin + segment.timestamp_ns + segment.offset_ns, 1000)
            assert not rest and f"__{channel}__{time_us}." in files[time_us]
            assert sample.members[segment.member] == (tmp_path / files[time_us]).read_bytes()
            assert (segment.height, segment.width, segment.start, segment.stop) == (18, 32, 0, 1)
        assert all({s.camera for s in members} == set(Camera) for members in by_slice.values())
        assert sorted(by_slice) == list(range(len(by_slice))) and sample.recording == sample.key[:10]
    assert not flags(samples)


def test_state_comes_from_the_ego_poses_and_actions_from_the_bus(tmp_path):
    write_nuscenes(tmp_path)
    samples, _ = read("nuscenes", tmp_path)
    for sample in samples.values():
        scene_s = (Clocks.from_bytes(sample.members[CLOCKS]).origin_ns // 1000 - START_US) / 1e6 % 60
        for segment in of(sample, Modality.STATE):
            speed, yaw_rate = array(sample, segment.member)[segment.start]
            assert (speed, yaw_rate) == pytest.approx((SPEED, YAW_RATE), rel=2e-3) and segment.offset_ns <= 0
        for segment in of(sample, Modality.INERTIAL):
            window = array(sample, segment.member)[segment.start : segment.stop]
            raw = (segment.timestamp_ns + segment.offset_ns) / 1e9 + scene_s
            assert window[-1] == pytest.approx([raw, 0, 9.8, 0, 0, YAW_RATE], abs=1e-4) and len(window) == 10
            assert -10 * MS < segment.offset_ns <= 0
        assert len(of(sample, Modality.ACTION)) == len(of(sample, Modality.INERTIAL)) > 0
        for segment in of(sample, Modality.ACTION):
            table = array(sample, segment.member)[segment.start : segment.stop]
            step = (segment.timestamp_ns + segment.offset_ns) / 1e9 + scene_s + 0.05 * (1 + np.arange(len(table)))
            assert 0 <= segment.offset_ns < 50 * MS
            assert ((table[:, 0] <= step + 1e-5) & (table[:, 0] > step - 0.0101)).all()
            assert ((table[:, 1] - 20 <= step + 1e-5) & (table[:, 1] - 20 > step - 0.0201)).all()


def test_without_the_bus_its_streams_are_absent_and_counted(tmp_path):
    write_nuscenes(tmp_path, can_bus=False)
    samples, refused = read("nuscenes", tmp_path)
    assert not refused and flags(samples) == {f"imu: {slices.MISSING}": 12, f"actions: {slices.MISSING}": 12}


def test_a_missing_key_frame_is_absent_and_not_the_one_before(tmp_path):
    write_nuscenes(tmp_path, scenes=1, missing=(("CAM_BACK", 2), ("CAM_BACK", 5), ("CAM_FRONT", 0)))
    samples, _ = read("nuscenes", tmp_path, slices=6)
    (sample,) = samples.values()
    have = {c: {s.slice for s in of(sample, Modality.VISION) if s.camera == c} for c in Camera}
    assert have[Camera.BACK] == {0, 1, 3, 4} and have[Camera.FRONT] == {1, 2, 3, 4, 5}
    assert have[Camera.BACK_RIGHT] == set(range(6))
    assert flags(samples) == {
        f"CAM_BACK: {slices.BEYOND_GAP}": 1,
        f"CAM_BACK: {slices.EDGE}": 1,
        f"CAM_FRONT: {slices.EDGE}": 1,
    }


def test_an_image_whose_file_is_gone_is_absent_and_counted(tmp_path):
    tables = write_nuscenes(tmp_path, scenes=1)
    rows = [row for row in tables["sample_data"] if "samples/CAM_FRONT/" in row["filename"]]
    (tmp_path / rows[1]["filename"]).unlink()
    samples, _ = read("nuscenes", tmp_path, slices=6)
    assert flags(samples) == {"CAM_FRONT: image file is missing": 1, f"CAM_FRONT: {slices.BEYOND_GAP}": 1}


def test_a_rig_without_one_camera_counts_it_in_every_slice(tmp_path):
    write_nuscenes(tmp_path, scenes=1, missing=tuple(("CAM_BACK", number) for number in range(6)))
    samples, refused = read("nuscenes", tmp_path)
    assert not refused and flags(samples) == {f"CAM_BACK: {slices.MISSING}": 6}


def test_a_sample_without_the_reference_camera_is_quarantined(tmp_path):
    write_nuscenes(tmp_path, scenes=1, missing=(("CAM_BACK_LEFT", 3),))
    samples, refused = read("nuscenes", tmp_path, slices=6)
    assert sum(len({s.slice for s in sample.segments}) for sample in samples.values()) == 5
    assert {key: refusal.reason for key, refusal in refused.items()} == {"scene-0000-sample0-3": "no reference frame"}
    write_nuscenes(tmp_path / "none", scenes=1, missing=tuple(("CAM_FRONT", number) for number in range(6)))
    samples, refused = read("nuscenes", tmp_path / "none", reference="CAM_FRONT", causal=False)
    assert not samples and {r.reason for r in refused.values()} == {"no reference frame"}


@pytest.mark.parametrize("policy, cameras", [("flag", 6), ("drop", 4)])
def test_the_skew_policy_flags_or_drops_what_is_beyond_the_budget(tmp_path, policy, cameras):
    write_nuscenes(tmp_path, scenes=1)
    samples, _ = read("nuscenes", tmp_path, skew=SkewPolicy(budget_ns=30 * MS, policy=policy))
    said = slices.SKEW_KEPT if policy == "flag" else slices.SKEW_LEFT_OUT
    assert flags(samples) == {f"CAM_FRONT_LEFT: {said}": 6, f"CAM_FRONT: {said}": 6}
    for sample in samples.values():
        assert len(of(sample, Modality.VISION)) == cameras * len({s.slice for s in sample.segments})


def test_without_causality_the_front_camera_may_be_the_reference(tmp_path):
    write_nuscenes(tmp_path, scenes=1)
    samples, _ = read("nuscenes", tmp_path, reference="CAM_FRONT", causal=False, slices=6)
    (sample,) = samples.values()
    offsets = {s.camera: s.offset_ns for s in of(sample, Modality.VISION)}
    assert offsets == {CAMERAS[c]: (us - SWEEP_US["CAM_FRONT"]) * 1000 for c, us in SWEEP_US.items()}
    assert len(of(sample, Modality.VISION)) == 36
    # Causal, the cameras behind the front one in the sweep have nothing of their slice at its time.
    causal, _ = read("nuscenes", tmp_path, reference="CAM_FRONT", slices=6)
    assert {s.camera for sample in causal.values() for s in of(sample, Modality.VISION)} == {0, 1}


def shifted(tables):
    """The row of an image says another millisecond than its name."""
    for row in tables["sample_data"]:
        if "samples/CAM_FRONT/" in row["filename"]:
            row["timestamp"] += 1_001


def repeated(tables):
    rows = [row for row in tables["sample_data"] if "samples/CAM_BACK_LEFT/" in row["filename"]]
    rows[3]["timestamp"] = rows[2]["timestamp"]


@pytest.mark.parametrize("edit, says", [(shifted, "CAM_FRONT' is 1.001 ms from"), (repeated, "repeats at row 3")])
def test_times_that_contradict_are_refused(tmp_path, edit, says):
    write_nuscenes(tmp_path, scenes=1, edit=edit)
    samples, refused = read("nuscenes", tmp_path, slices=6)
    assert not samples
    (refusal,) = refused.values()
    assert refusal.reason == slices.BAD_CLOCK and says in str(refusal)


def test_a_name_within_a_millisecond_of_its_row_is_right(tmp_path):
    def nearly(tables):
        for row in tables["sample_data"]:
            row["timestamp"] += 900

    write_nuscenes(tmp_path, scenes=1, edit=nearly)
    samples, refused = read("nuscenes", tmp_path)
    assert samples and not refused


def floats(tables):
    row = next(row for row in tables["sample_data"] if row["filename"].startswith("samples/"))
    row["timestamp"] = float(row["timestamp"])


def dangling(tables):
    tables["sample"].pop()


def unnamed(tables):
    del tables["scene"][0]["name"]


@pytest.mark.parametrize(
    "edit, says",
    [(floats, "not an integer of microseconds"), (dangling, "names sample .* lacks"), (unnamed, "row 0 has no name")],
)
def test_malformed_tables_are_an_error_that_names_them(tmp_path, edit, says):
    write_nuscenes(tmp_path, scenes=1, edit=edit)
    with pytest.raises(DataError, match=says):
        read("nuscenes", tmp_path)


def test_what_is_no_nuscenes_set_is_said_so(tmp_path):
    with pytest.raises(DataError, match="no nuScenes set"):
        read("nuscenes", tmp_path)
    with pytest.raises(ValueError, match="reference"):
        read("nuscenes", tmp_path, reference="CAM_TOP")


def test_what_was_flagged_and_the_chosen_budget_stand_in_the_manifest(tmp_path):
    write_nuscenes(tmp_path / "raw", scenes=3)
    options = {"skew": {"budget_ns": 30 * MS, "policy": "flag"}, "prepare": {"heldout_share": 0.4}}
    made = prepare(
        "nuscenes",
        tmp_path / "raw",
        tmp_path / "out",
        text_tokenizer=TextConfig().build(),
        options=options,
    )
    manifest = made.manifest
    assert manifest.skew_budget_ns == 30 * MS
    for name, scenes in (("train", 2), ("heldout", 1)):
        flagged = manifest.splits[name].flagged
        assert flagged[f"CAM_FRONT: {slices.SKEW_KEPT}"] == 6 * scenes and flagged[f"state: {slices.EDGE}"] == scenes
    (flagged,) = [section for section in made.summary.sections if f"flagged: CAM_FRONT: {slices.SKEW_KEPT}" in section]
    assert made.summary.splits == ("train", "heldout")
    assert flagged[f"flagged: CAM_FRONT: {slices.SKEW_KEPT}"] == ["12", "6"]
