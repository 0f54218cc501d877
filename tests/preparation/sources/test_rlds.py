"""Episodes of RLDS, in files written from the definitions of tfrecord, tf.train.Example and tensorflow-datasets."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from mmoe.data.load.tables import load_array
from mmoe.errors import DataError
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.rlds import _example
from mmoe.preparation.sources.tfrecord import masked_crc, records
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera
from tests.data.recordings_rlds import (
    crc32c,
    episode,
    example,
    masked,
    record,
    sequence,
    step_features,
    tensor,
    write_rlds,
)
from tests.data.recordings_robot import write_bridge
from tests.preparation.sources.test_lerobot import by_kind, number_of
from tests.preparation.sources.test_sources import read, texts
from tests.preparation.test_prepare import read_everything, rows, run


@pytest.fixture(autouse=True)
def _no_episode_of_before():
    _example.cache_clear()


def shard(folder, split="train", number=0, count=1):
    return folder / f"arm-{split}.tfrecord-{number:05d}-of-{count:05d}"


def arrays(sample):
    return {
        name: load_array(sample.members[name], "x") for name in ("state.npy", "actions.npy") if name in sample.members
    }


def test_the_checksum_is_that_of_tfrecord_files():
    # Vectors of RFC 3720 (B.4), and the head of a record as TensorFlow writes it for 3 bytes.
    vectors = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    for data, crc in vectors.items():
        assert crc32c(data) == crc
        assert struct.pack("<I", masked_crc(data)) == masked(data)
        assert ((masked_crc(data) - 0xA282EAD8) & 0xFFFFFFFF) == (crc >> 15 | crc << 17) & 0xFFFFFFFF


@pytest.mark.parametrize("packed", [True, False])
def test_lists_of_an_example_are_read_as_they_were_written(tmp_path, packed):
    numbers = [0, 1, 127, 128, 300, -1, 2**63 - 1, -(2**63)]
    written = {"a/b": [b"", b"x" * 200], "f": [1.5, -0.25, 3.0], "i": numbers, "é": [b"y"]}
    (tmp_path / "f").write_bytes(record(example(written, packed)) + record(b"") + record(example({"f": [2.0]})))
    first, empty, last = records(tmp_path / "f")
    lists = first.example()
    assert lists["a/b"].byte_strings() == written["a/b"] and lists["é"].byte_strings() == [b"y"]
    assert lists["f"].numbers().tolist() == written["f"] and lists["i"].numbers().tolist() == numbers
    assert {key: first.count(key) for key in written} == {key: len(values) for key, values in written.items()}
    assert first.count("absent") is None and empty.example() == {} and last.example()["f"].numbers().tolist() == [2.0]


def test_every_step_has_its_image_state_action_and_instruction(tmp_path):
    lengths = [5, 8, 3, 6]
    files = [[episode(0, 5), episode(1, 8)], [], [episode(2, 3), episode(3, 6)]]
    write_rlds(tmp_path, {"train": files})
    samples, refused = read("rlds", tmp_path, rate_hz=5, slices=3, lookahead=2)
    assert not refused and len(samples) == sum(-(-n // 3) for n in lengths)
    for key, sample in samples.items():
        _, file, place, first = key.split("-")
        e, first = int(file) + int(place), int(first)
        assert sample.recording == key.rpartition("-")[0] and texts(sample) == [f"task {e}"] * bool(texts(sample))
        state, action = arrays(sample).values()
        slices = {s.slice for s in sample.segments}
        for number in slices:
            i = first + number
            seen, held = (
                next(s for s in by_kind(sample, k) if s.slice == number) for k in (Modality.VISION, Modality.STATE)
            )
            assert number_of(sample, seen) == (e * 8 + i) % 32 and seen.camera == -1
            assert seen.timestamp_ns == number * 200_000_000
            assert state[held.stop - 1].tolist() == [e, i, 0.5]
            acts = [s for s in by_kind(sample, Modality.ACTION) if s.slice == number]
            assert len(acts) == (i < lengths[e] - 1)  # the step marked is_last has none
            for act in acts:
                end = min(first + 3 + 2, lengths[e] - 1)
                assert action[act.start : act.stop].tolist() == [[e, j, 0.25] for j in range(i + 1, end + 1)]
        left_out = sample.flags["action of the last step: left out"]
        assert left_out == (max(slices) + first == lengths[e] - 1)


def test_the_last_action_is_read_where_the_writer_put_one(tmp_path):
    write_rlds(tmp_path, {"train": [[episode(0, 4)]]})
    samples, _ = read("rlds", tmp_path, rate_hz=5, last_action=True)
    (sample,) = samples.values()
    assert arrays(sample)["actions.npy"][:, 1].tolist() == [1, 2, 3, 4] and len(by_kind(sample, Modality.ACTION)) == 4
    samples, _ = read("rlds", tmp_path, rate_hz=5)
    (sample,) = samples.values()
    assert arrays(sample)["actions.npy"][:, 1].tolist() == [1, 2, 3]
    clocks = Clocks.from_bytes(sample.members[CLOCKS])
    assert clocks.kind == "synthetic" and clocks.times_ns["image_0"].tolist() == [0, 200e6, 400e6, 600e6]


def test_an_episode_of_one_last_step_has_no_action(tmp_path):
    write_rlds(tmp_path, {"train": [[episode(0, 1)]]})
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert not refused and not by_kind(samples["train-00000-000000-000000"], Modality.ACTION)
    _, refused = read("rlds", tmp_path, rate_hz=5, cameras={}, state=())
    assert [refusal.reason for refusal in refused.values()] == ["nothing observed"]


def test_cameras_that_the_episode_says_it_lacks_are_absent(tmp_path):
    cameras = ("image_0", "image_1")
    has = [{"episode_metadata/has_image_0": [1], "episode_metadata/has_image_1": [n]} for n in (1, 0)]
    episodes = [episode(n, 2, cameras, **has[n]) for n in (0, 1)]
    flags = {name: tensor(dtype="bool") for name in ("has_image_0", "has_image_1")}
    write_rlds(tmp_path, {"train": [episodes]}, steps=step_features(cameras), metadata=flags)
    with pytest.raises(DataError, match="has the cameras observation/image_0, observation/image_1; say by the option"):
        read("rlds", tmp_path, rate_hz=5)
    chosen = {"observation/image_1": "back", "observation/image_0": "front"}
    both, one = read("rlds", tmp_path, rate_hz=5, cameras=chosen)[0].values()
    assert [s.camera for s in by_kind(both, Modality.VISION)] == [Camera.BACK, Camera.FRONT] * 2
    assert [number_of(both, s, 2 * (s.camera == Camera.BACK)) for s in by_kind(both, Modality.VISION)] == [0, 0, 1, 1]
    assert {s.camera for s in by_kind(one, Modality.VISION)} == {Camera.FRONT}
    assert one.flags["image_1: absent from its episode"] == 1 and not both.flags["image_1: absent from its episode"]


def test_state_and_action_are_joined_from_several_features(tmp_path):
    """Actions in parts, an integer class among them, and a ragged sequence whose rows have one length."""
    parts = {
        "steps/action/world": [v for i in range(3) for v in (float(i), float(-i))],
        "steps/action/open": [0, 1, 1],
        "steps/observation/joints/ragged_flat_values": [float(i) for i in range(12)],
        "steps/observation/joints/ragged_row_lengths_0": [2, 2, 2],
    }
    lists = {key: values for key, values in episode(0, 3).items() if key != "steps/action"} | parts
    steps = step_features()
    steps["action"] = {"featuresDict": {"features": {"world": tensor(2), "open": {"classLabel": {"numClasses": "2"}}}}}
    steps["observation"]["featuresDict"]["features"]["joints"] = sequence(tensor(2), 2)
    write_rlds(tmp_path, {"train": [[lists]]}, steps=steps)
    options = {
        "rate_hz": 10,
        "action": ("action/open", "action/world"),
        "state": ("observation/joints",),
        "last_action": True,
    }
    (sample,) = read("rlds", tmp_path, **options)[0].values()
    assert arrays(sample)["actions.npy"].tolist() == [[0, 0, 0], [1, 1, -1], [1, 2, -2]]
    assert arrays(sample)["state.npy"].tolist() == np.arange(12).reshape(3, 4).tolist()
    source = SOURCES.find("rlds")
    described = source.described(tmp_path, source.config(**options))
    assert described.vector_names["ACTION"] == ("open_0", "world_0", "world_1")
    assert described.vector_names["STATE"] == tuple(f"joints_{n}" for n in range(4))
    assert described.action_period_ns == 100_000_000
    named = source.described(tmp_path, source.config(**options, action_names=("grip", "x", "y")))
    assert named.vector_names["ACTION"] == ("grip", "x", "y")
    with pytest.raises(DataError, match=r"action_names has 1 different names, but action/open \+ action/world has 3"):
        source.described(tmp_path, source.config(**options, action_names=("grip",)))
    lists["steps/observation/joints/ragged_row_lengths_0"] = [2, 1, 3]
    write_rlds(tmp_path, {"train": [[lists]]}, steps=steps)
    _example.cache_clear()
    (refusal,) = read("rlds", tmp_path, **options)[1].values()
    assert "rows of observation/joints have lengths [1, 2, 3], not 2" in str(refusal)


def damage(file, at, byte=None):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 if byte is None else byte
    file.write_bytes(data)


def test_a_wrong_checksum_loses_its_own_episode(tmp_path):
    write_rlds(tmp_path, {"train": [[episode(n, 2) for n in range(3)]]})
    second = list(records(shard(tmp_path)))[1]
    damage(shard(tmp_path), second.stop - 1)  # the last byte of its data: a value, so all can still be parsed
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert {s.recording for s in samples.values()} == {"train-00000-000000", "train-00000-000002"}
    (refusal,) = refused.values()
    assert refusal.reason == "damaged record" and "record 1: its data has another checksum than it states" in str(
        refusal
    )


def test_a_damaged_length_ends_the_file_and_says_how_much_is_lost(tmp_path):
    write_rlds(tmp_path, {"train": [[episode(n, 2) for n in range(4)], [episode(4, 2)]]})
    file = shard(tmp_path, count=2)
    damage(file, list(records(file))[1].start - 12)
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert {s.recording for s in samples.values()} == {"train-00000-000000", "train-00001-000000"}
    assert list(refused) == [file.name] and refused[file.name].reason == "damaged record"
    assert "the length of record 1, at byte" in str(refused[file.name])
    assert "(3 of its 4 episodes are not read)" in str(refused[file.name])


@pytest.mark.parametrize("left", [5, 15, 400])
def test_a_torn_file_is_read_up_to_where_it_ends(tmp_path, left):
    write_rlds(tmp_path, {"train": [[episode(n, 2) for n in range(3)]]})
    last = list(records(shard(tmp_path)))[2]
    shard(tmp_path).write_bytes(shard(tmp_path).read_bytes()[: last.start - 12 + left])
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert len(samples) == 2 and [r.reason for r in refused.values()] == ["torn tfrecord file"]
    assert "ends within record 2" in str(refused[shard(tmp_path).name]) and "1 of its 3 episodes" in str(
        *refused.values()
    )


def test_files_that_are_missing_short_or_of_no_split_are_counted(tmp_path):
    write_rlds(tmp_path, {"train": [[episode(0, 2), episode(1, 2)], [episode(2, 2)]], "val": [[episode(3, 2)]]})
    whole = list(records(shard(tmp_path, count=2)))
    shard(tmp_path, count=2).write_bytes(shard(tmp_path, count=2).read_bytes()[: whole[0].stop + 4])
    shard(tmp_path, number=1, count=2).rename(tmp_path / "arm-old.tfrecord-00000-of-00001")
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert len(samples) == 1
    assert {name: refusal.reason for name, refusal in refused.items()} == {
        "arm-train.tfrecord-00000-of-00002": "inconsistent episode",
        "arm-train.tfrecord-00001-of-00002": "missing file",
        "arm-old.tfrecord-00000-of-00001": "file of no split",
    }
    assert "has 1 episodes, dataset_info.json says 2" in str(refused["arm-train.tfrecord-00000-of-00002"])
    assert "its 1 episodes are missing" in str(refused["arm-train.tfrecord-00001-of-00002"])


def test_columns_that_are_missing_or_of_another_length_are_refused(tmp_path):
    without, short, odd, other = (episode(n, 2) for n in range(4))
    del without["steps/observation/state"]
    short["steps/action"] = short["steps/action"][:3]
    odd["steps/observation/image_0"] = [b"no image", b"none"]
    other["steps/action"] = [b"text"] * 6
    write_rlds(tmp_path, {"train": [[without, short, odd, other, episode(4, 2)]]})
    samples, refused = read("rlds", tmp_path, rate_hz=5)
    assert {s.recording for s in samples.values()} == {"train-00000-000004"}
    said = [str(refusal) for refusal in refused.values()]
    reasons = ["no such column", "inconsistent episode", "unreadable image or video", "inconsistent episode"]
    assert [refusal.reason for refusal in refused.values()] == reasons
    assert "record 0 has no steps/observation/state, which features.json names" in said[0]
    assert "record 1: steps/action has 3 values where its steps have 6" in said[1]
    assert "record 3: steps/action holds bytes and not numbers" in said[3]
    _, refused = read("rlds", tmp_path, rate_hz=5, cameras={})
    assert len(refused) == 3  # counted by their state: the one without it has none


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rate_hz": None}, "no file of RLDS says how fast its steps were; set rate_hz"),
        ({"action": ("actions",)}, "a step has no feature 'actions'; did you mean action"),
        (
            {"state": ("language_instruction",)},
            "'language_instruction' .* is not a fixed number of numbers in each step",
        ),
        ({"cameras": {"action": "front"}}, "'action' .* is not an image in each step; correct the option cameras"),
        ({"instruction": "action"}, "'action' .*is not a text in each step"),
        ({"splits": ("test",)}, "has no split 'test'; it has train: set the option splits"),
        ({"cameras": {}, "state": (), "action": ()}, "leave nothing to read"),
    ],
)
def test_options_that_do_not_fit_are_an_error_that_names_them(tmp_path, options, said):
    write_rlds(tmp_path, {"train": [[episode(0, 2)]]})
    with pytest.raises(DataError, match=said):
        read("rlds", tmp_path, **({"rate_hz": 5} | options))


@pytest.mark.parametrize(
    "file, change, said",
    [
        (
            "dataset_info.json",
            lambda info: info.update(fileFormat="array_record"),
            "'array_record'; only tfrecord is read",
        ),
        ("dataset_info.json", lambda info: info["splits"][0].pop("shardLengths"), "cannot be read as a description"),
        ("dataset_info.json", lambda info: info.update(splits=3), "cannot be read as a description"),
        (
            "features.json",
            lambda tree: tree.update(featuresDict={"features": {"image": {}}}),
            "has no sequence 'steps'",
        ),
        ("features.json", lambda tree: tree.pop("featuresDict"), "cannot be read as a description of features"),
    ],
)
def test_a_damaged_description_is_an_error_that_names_it(tmp_path, file, change, said):
    write_rlds(tmp_path, {"train": [[episode(0, 2)]]})
    content = json.loads((tmp_path / file).read_text())
    change(content)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=said) as caught:
        read("rlds", tmp_path, rate_hz=5)
    assert file in str(caught.value)


def test_a_folder_above_the_version_is_told_the_one_below(tmp_path):
    write_rlds(tmp_path / "arm/1.0.0", {"train": [[episode(0, 2)]]})
    with pytest.raises(DataError, match="arm is no version of a data set; give the folder of one, as .*arm/1.0.0"):
        read("rlds", tmp_path / "arm", rate_hz=5)


def test_prepared_episodes_are_whole_and_what_is_not_read_is_said(tmp_path):
    train = [[episode(n, 3 + n % 3) for n in range(8)]]
    write_rlds(tmp_path / "in", {"train": train, "val": [[episode(9, 4)]]})
    manifest, printed = run("rlds", tmp_path / "in", tmp_path / "out", slices=2, rate_hz=5)
    counts = read_everything(tmp_path / "out", manifest)
    steps = sum(len(lists["steps/is_last"]) for lists in train[0])
    assert sum(n for (_, kind), n in counts.items() if kind == "VISION") == steps
    assert sum(n for (_, kind), n in counts.items() if kind == "ACTION") == steps - 8
    assert manifest.clock == "synthetic" and not manifest.quarantined
    assert sum(split.flagged["action of the last step: left out"] for split in manifest.splits.values()) == 8
    assert manifest.vectors["ACTION"].names == ("action_0", "action_1", "action_2")
    assert manifest.vectors["ACTION"].period_ns == 200_000_000
    assert "split val (1 episodes) is not read" in " ".join(printed.split())
    sides = {s: {i.recordings[r] for i, r in rows(tmp_path / "out", manifest, s)} for s in manifest.splits}
    assert sides["heldout"] and not sides["heldout"] & sides["train"]


def test_one_recording_gives_the_same_samples_as_bridge_and_as_rlds(tmp_path):
    write_bridge(tmp_path / "in", [{"steps": n, "cameras": [0, 2]} for n in (5, 3)])
    keys, episodes = {"observation/state": "state", "action": "action"}, []
    for folder in sorted((tmp_path / "in").glob("ep[0-9]*")):
        with np.load(folder / "steps.npz") as tables:
            lists = {f"steps/{name}": tables[key].ravel().tolist() for name, key in keys.items()}
        for camera in (0, 2):
            files = sorted(folder.glob(f"image_{camera}_*.jpg"))
            lists[f"steps/observation/image_{camera}"] = [file.read_bytes() for file in files]
        lists["steps/language_instruction"] = [f"task {int(folder.name[2:])}".encode()] * len(files)
        lists["steps/is_last"] = [int(file is files[-1]) for file in files]
        episodes.append(lists)
    steps = step_features(("image_0", "image_2"))
    steps["action"] = steps["observation"]["featuresDict"]["features"]["state"] = tensor(7)
    write_rlds(tmp_path / "rlds", {"train": [episodes]}, steps=steps)
    cameras = {"observation/image_0": "front", "observation/image_2": "front_right"}
    same, _ = read("rlds", tmp_path / "rlds", rate_hz=5, cameras=cameras, last_action=True, slices=3)
    bridge, _ = read("bridge", tmp_path / "in", slices=3)
    assert len(same) == len(bridge) == 3
    for one, other in zip(bridge.values(), same.values()):
        assert [replace(s, member=s.member.replace("jpeg", "jpg")) for s in other.segments] == one.segments
        clocks = {CLOCKS}  # which name the recording
        assert {n.replace("jpeg", "jpg"): m for n, m in other.members.items() if n not in clocks} == {
            n: m for n, m in one.members.items() if n not in clocks
        }
        assert other.flags == one.flags
