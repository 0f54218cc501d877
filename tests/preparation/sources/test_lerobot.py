"""LeRobot v3.0 datasets written exactly as the format says: many episodes end to end in one video."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe.config.load import validate
from mmoe.data.load.media import load_image
from mmoe.data.load.tables import load_array
from mmoe.errors import ConfigError, DataError
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.lerobot import LeRobotConfig, _episode_rows, _numbered
from mmoe.schema.modality import Modality
from mmoe.schema.rig import Rig
from mmoe.schema.sample import Camera
from tests.data.recordings_robot import LEVEL, write_lerobot
from tests.preparation.sources.test_sources import read, texts
from tests.preparation.test_prepare import read_everything, rows, run


def by_kind(sample, kind):
    return [segment for segment in sample.segments if segment.modality is kind]


def number_of(sample, segment, shift=0):
    """Which image of `level_images` a segment shows."""
    return round((load_image(sample.members[segment.member], "x").mean() - shift - 10) / LEVEL)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("files", [1, 2])
def test_every_row_has_its_frame_state_and_actions(tmp_path, backend, files):
    lengths = [5, 8, 3, 6]
    write_lerobot(tmp_path, lengths, files=files)
    samples, refused = read("lerobot", tmp_path, slices=3, lookahead=2, video_backend=backend)
    assert not refused and len(samples) == sum(-(-n // 3) for n in lengths)
    for key, sample in samples.items():
        _, episode, first = key.split("-")
        e, first = int(episode), int(first)
        assert sample.recording == f"episode-{e:06d}" and texts(sample) == [["lift the cube", "drop the cube"][e % 2]]
        state, action = (load_array(sample.members[m], "x") for m in ("state.npy", "actions.npy"))
        for number, (seen, held, act) in enumerate(
            zip(*(by_kind(sample, k) for k in (Modality.VISION, Modality.STATE, Modality.ACTION)), strict=True)
        ):
            i = first + number
            assert number_of(sample, seen) == (e * 8 + i) % 32
            assert (seen.height, seen.width, seen.camera) == (32, 64, -1)
            assert abs(seen.timestamp_ns - number * 100_000_000) < 100 and abs(seen.offset_ns) <= 1_000_000
            assert state[held.stop - 1].tolist() == [e, i, 0.5]
            end = min(first + 3 + 2, lengths[e])  # never into the next episode
            assert action[act.start : act.stop, 1].tolist() == list(range(i + 1, end + 1))
            assert set(action[:, 0].tolist()) == {e}


@pytest.mark.parametrize(
    "encoding",
    [
        {"codec": "libx265", "x265-params": "log-level=none:keyint=2:min-keyint=2:crf=1"},
        {"codec": "libsvtav1", "g": 2, "crf": 1, "preset": 10},  # what LeRobot itself writes
    ],
    ids=lambda encoding: encoding["codec"],
)
def test_videos_in_other_codecs_show_the_frame_of_the_row(tmp_path, encoding):
    write_lerobot(tmp_path, [8, 8, 8, 8], encoding=encoding)
    samples, refused = read("lerobot", tmp_path, slices=3)
    assert not refused and len(samples) == 12
    for key, sample in samples.items():
        _, episode, first = key.split("-")
        seen = [number_of(sample, segment) for segment in by_kind(sample, Modality.VISION)]
        start = int(episode) * 8 + int(first)
        assert seen == [number % 32 for number in range(start, start + len(seen))]
    _, refused = read("lerobot", tmp_path, slices=3, video_backend="decord")
    assert len(refused) == 12 and all("set video_backend=auto" in str(refusal) for refusal in refused.values())


def test_cameras_are_mapped_by_option(tmp_path):
    cameras = ("observation.images.top", "observation.images.wrist.left")
    write_lerobot(tmp_path, [4, 4], cameras=cameras)
    with pytest.raises(DataError, match="has the cameras observation.images.top, .*say by the option cameras"):
        read("lerobot", tmp_path)
    samples, _ = read("lerobot", tmp_path, cameras={cameras[1]: "front", cameras[0]: None})
    sample = samples["episode-000001-000000"]
    first = [s for s in by_kind(sample, Modality.VISION) if s.slice == 0]
    assert [(s.member, s.camera) for s in first] == [("wrist_left-0.jpg", Camera.FRONT), ("top-0.jpg", -1)]
    assert [number_of(sample, s, shift) for s, shift in zip(first, (2, 0))] == [8, 8]
    samples, _ = read("lerobot", tmp_path, cameras={cameras[0]: "back"})
    assert {s.camera for x in samples.values() for s in by_kind(x, Modality.VISION)} == {Camera.BACK}
    with pytest.raises(DataError, match="has no feature 'top'; it has observation.state"):
        read("lerobot", tmp_path, cameras={"top": "front"})
    with pytest.raises(DataError, match="'action' is float32, not images"):
        read("lerobot", tmp_path, cameras={"action": "front"})


def test_cameras_are_those_of_the_rig_that_the_options_name(tmp_path):
    cameras = ("observation.images.top", "observation.images.wrist.left")
    write_lerobot(tmp_path, [4, 4], cameras=(), stored=cameras)
    rig = Rig(cameras=("wrist_left", "wrist_right", "top"))
    samples, _ = read("lerobot", tmp_path, rig=rig, cameras={cameras[0]: "top", cameras[1]: "wrist_left"})
    shown = [s for s in by_kind(samples["episode-000001-000000"], Modality.VISION) if s.slice == 0]
    assert [(s.member, s.camera) for s in shown] == [("top-0.jpeg", 2), ("wrist_left-0.jpeg", 0)]
    with pytest.raises(ConfigError, match="cameras.observation.images.top: 'fornt' is no camera .*did you mean front?"):
        validate(LeRobotConfig, {"cameras": {cameras[0]: "fornt"}}, "test")
    with pytest.raises(ConfigError, match="'front' is no camera of the rig. Name it in rig.cameras, which has top"):
        validate(LeRobotConfig, {"rig": {"cameras": ["top"]}, "cameras": {cameras[0]: "front"}}, "test")


def test_images_inside_parquet_are_taken_as_they_are(tmp_path):
    write_lerobot(tmp_path, [3, 3], cameras=(), stored=("observation.image",))
    samples, refused = read("lerobot", tmp_path)
    assert not refused
    sample = samples["episode-000001-000000"]
    assert [number_of(sample, s) for s in by_kind(sample, Modality.VISION)] == [8, 9, 10]
    file = tmp_path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    stored = table["observation.image"].to_pylist()
    assert sample.members["observation_image-1.jpeg"] == stored[4]["bytes"]
    stored[1]["bytes"] = None
    pq.write_table(table.set_column(table.column_names.index("observation.image"), "observation.image", [stored]), file)
    _episode_rows.cache_clear()
    samples, refused = read("lerobot", tmp_path)
    assert set(samples) == {"episode-000001-000000"} and refused["episode-000000-000000"].reason == "missing image"


@pytest.mark.parametrize(
    "names, expected",
    [
        (["x", "y", "grip"], ("x", "y", "grip")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"a": 0, "b": 1, "c": 2}, ("a", "b", "c")),
        (None, ("state_0", "state_1", "state_2")),
    ],
)
def test_dimensions_have_the_names_of_the_info(tmp_path, names, expected):
    write_lerobot(tmp_path, [2, 2], names=names, fps=30)
    source = SOURCES.find("lerobot")
    described = source.described(tmp_path, source.config())
    assert described.vector_names == {"STATE": expected, "ACTION": ("x", "y", "grip")}
    assert described.action_period_ns == 33_333_333
    without = source.described(tmp_path, source.config(state=None))
    assert set(without.vector_names) == {"ACTION"}


def test_names_that_do_not_fit_the_shape_are_an_error(tmp_path):
    write_lerobot(tmp_path, [2, 2], names=["x", "y"])
    with pytest.raises(DataError, match=r"'observation.state' has shape \[3\] but names \['x', 'y'\]"):
        SOURCES.find("lerobot").described(tmp_path, SOURCES.find("lerobot").config())


def test_preparation_names_the_dimensions_and_says_that_the_clock_is_synthetic(tmp_path):
    write_lerobot(tmp_path / "in", [3, 2, 12, 4, 5, 1])
    manifest, printed = run("lerobot", tmp_path / "in", tmp_path / "out", slices=4)
    counts = read_everything(tmp_path / "out", manifest)
    assert sum(n for (_, kind), n in counts.items() if kind == "VISION") == 27
    assert manifest.clock == "synthetic" and "clock: synthetic" in printed and not manifest.quarantined
    assert manifest.vectors["ACTION"].names == ("x", "y", "grip")
    assert manifest.vectors["ACTION"].period_ns == 100_000_000
    sides = {s: {i.recordings[r] for i, r in rows(tmp_path / "out", manifest, s)} for s in manifest.splits}
    assert sides["heldout"] and not sides["heldout"] & sides["train"]


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_older_versions_are_refused_by_name(tmp_path, version):
    write_lerobot(tmp_path, [2, 2], version=version)
    with pytest.raises(DataError, match=f"is a LeRobot dataset {version}; only v3.0 is read: convert it with"):
        read("lerobot", tmp_path)


def test_frames_that_are_not_where_the_rows_say_are_refused(tmp_path):
    """Video frames 40 ms late: the row's time and the file's time differ by more than 1 ms."""
    late = [100 * i + (40 if i >= 9 else 0) for i in range(13)]
    write_lerobot(tmp_path, [5, 8], times_ms=late)
    samples, refused = read("lerobot", tmp_path, slices=4)
    assert set(samples) == {"episode-000000-000000", "episode-000000-000004", "episode-000001-000000"}
    assert "is 40.000 ms from the time in the file" in str(refused["episode-000001-000004"])


def test_metadata_that_contradicts_the_data_is_refused(tmp_path):
    write_lerobot(tmp_path, [4, 4, 4])
    file = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    entries = pq.read_table(file).to_pylist()
    entries[0]["length"] = 5
    entries[2]["dataset_to_index"], entries[2]["length"] = 13, 5
    pq.write_table(pa.Table.from_pylist(entries), file)
    samples, refused = read("lerobot", tmp_path)
    assert set(samples) == {"episode-000001-000000"}
    assert {r.reason for r in refused.values()} == {"inconsistent episode"}
    assert "has 4 rows of episode-000002, the metadata says rows 8 to 13" in str(refused["episode-000002-000000"])


def test_missing_files_are_refused_or_named(tmp_path):
    write_lerobot(tmp_path, [2, 2], files=2)
    (tmp_path / "videos/observation.images.top/chunk-000/file-001.mp4").unlink()
    samples, refused = read("lerobot", tmp_path)
    assert len(samples) == 1 and [r.reason for r in refused.values()] == ["missing file"]
    (tmp_path / "meta/tasks.parquet").unlink()
    with pytest.raises(DataError, match="tasks.parquet cannot be read"):
        read("lerobot", tmp_path)
    with pytest.raises(DataError, match="info.json cannot be read .*give the folder of a LeRobot dataset"):
        read("lerobot", tmp_path / "meta")


def test_clips_carry_the_synthetic_clock_of_their_episode(tmp_path):
    write_lerobot(tmp_path, [5])
    samples, _ = read("lerobot", tmp_path, slices=3)
    clocks = Clocks.from_bytes(samples["episode-000000-000003"].members[CLOCKS])
    assert (clocks.log, clocks.kind) == ("episode-000000", "synthetic") and set(clocks.times_ns) == {
        "top",
        "state",
        "action",
    }
    np.testing.assert_allclose(clocks.times_ns["top"] + clocks.origin_ns, np.arange(5) * 1e8, atol=10)


def test_repeated_names_of_dimensions_keep_every_column_and_are_said(tmp_path):
    names = ["shoulder", "gripper", "shoulder", "gripper", "gripper_2"]
    assert _numbered(tuple(names)) == ("shoulder", "gripper", "shoulder_2", "gripper_3", "gripper_2")
    write_lerobot(tmp_path / "in", [4] * 8)
    info = json.loads((tmp_path / "in/meta/info.json").read_text())
    size = info["features"]["action"]["shape"][0]
    info["features"]["action"]["names"] = ["gripper"] * size
    (tmp_path / "in/meta/info.json").write_text(json.dumps(info))
    manifest, printed = run("lerobot", tmp_path / "in", tmp_path / "out")
    assert manifest.vectors["ACTION"].names == ("gripper", *(f"gripper_{n}" for n in range(2, size + 1)))
    assert "names repeat in info.json" in " ".join(printed.split())


def test_no_cameras_is_not_all_cameras(tmp_path):
    write_lerobot(tmp_path, [4, 4])
    samples, refused = read("lerobot", tmp_path, cameras={})
    assert not refused and not any(by_kind(s, Modality.VISION) for s in samples.values())
    assert all(by_kind(s, Modality.VISION) for s in read("lerobot", tmp_path)[0].values())
    with pytest.raises(DataError, match="leave nothing to read"):
        read("lerobot", tmp_path, cameras={}, state=None, action=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(fps=None),
        lambda info: info.update(fps=float("nan")),
        lambda info: info.update(fps=0),
        lambda info: info.update(features=[]),
        lambda info: info["features"]["action"].update(shape=2),
        lambda info: info["features"]["action"].update(names=5),
        lambda info: info["features"]["action"].update(dtype=None),
        lambda info: info["features"].update(action=None),
        lambda info: info.update(data_path=3),
        lambda info: info.pop("features"),
    ],
)
def test_a_damaged_description_is_an_error_that_names_it(tmp_path, change):
    write_lerobot(tmp_path, [3, 3])
    file = tmp_path / "meta/info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))
    source = SOURCES.find("lerobot")
    with pytest.raises(DataError, match=str(tmp_path)):
        list(source.items(tmp_path, source.config(), lambda *refusal: None))
        source.described(tmp_path, source.config())


def test_a_damaged_row_of_the_episodes_is_refused_alone(tmp_path):
    write_lerobot(tmp_path, [3, 3, 3])
    file = next((tmp_path / "meta/episodes").rglob("*.parquet"))
    rows = pq.read_table(file).to_pylist()
    rows[1]["length"] = None
    pq.write_table(pa.Table.from_pylist(rows), file)
    samples, refused = read("lerobot", tmp_path)
    assert {s.recording for s in samples.values()} == {"episode-000000", "episode-000002"}
    assert [r.reason for r in refused.values()] == ["inconsistent episode"]
