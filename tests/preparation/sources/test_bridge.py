"""Bridge episodes: what a slice holds, what an episode lacks, and what the real recordings are like."""

import numpy as np
import pytest

from mmoe.data.load.media import load_image
from mmoe.data.load.tables import load_array
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources.bridge import PERIOD_NS
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from tests.data.recordings_robot import write_bridge
from tests.preparation.sources.test_sources import read
from tests.preparation.test_prepare import read_everything, rows, run


def by_kind(sample, kind):
    return [segment for segment in sample.segments if segment.modality is kind]


def tables(folder, name):
    with np.load(folder / name / "steps.npz") as arrays:
        return arrays["state"], arrays["action"]


def test_a_slice_is_the_images_the_state_and_the_actions_from_its_step_on(tmp_path):
    write_bridge(tmp_path, [{"steps": 7, "cameras": [0, 1, 2]}, {"steps": 3, "cameras": [0, 2]}])
    samples, refused = read("bridge", tmp_path, slices=3, lookahead=2)
    assert not refused and list(samples) == ["ep00-0000", "ep00-0003", "ep00-0006", "ep01-0000"]
    cameras = {0: Camera.FRONT, 1: Camera.FRONT_LEFT, 2: Camera.FRONT_RIGHT}
    for key, sample in samples.items():
        name, first = key[:4], int(key[5:])
        state, action = tables(tmp_path, name)
        listed = [0, 1, 2] if name == "ep00" else [0, 2]  # what an episode does not list is absent
        held = load_array(sample.members["state.npy"], "x")
        stored = load_array(sample.members["actions.npy"], "x")
        vision = by_kind(sample, Modality.VISION)
        for number in {segment.slice for segment in sample.segments}:
            step = first + number
            shown = [s for s in vision if s.slice == number]
            assert [s.camera for s in shown] == [cameras[c] for c in listed]
            files = [(tmp_path / name / f"image_{c}_{step:02d}.jpg").read_bytes() for c in listed]
            assert [sample.members[s.member] for s in shown] == files
            assert all((s.height, s.width) == load_image(files[0], "x").shape[:2] for s in shown)
            (s,) = [s for s in by_kind(sample, Modality.STATE) if s.slice == number]
            (a,) = [s for s in by_kind(sample, Modality.ACTION) if s.slice == number]
            assert {x.timestamp_ns for x in (*shown, s, a)} == {number * PERIOD_NS} and s.offset_ns == a.offset_ns == 0
            np.testing.assert_array_equal(held[s.stop - 1], state[step])
            last = min(first + len(by_kind(sample, Modality.STATE)) + 2, len(action))
            np.testing.assert_array_equal(stored[a.start : a.stop], action[step:last])
            assert a.start >= min(step, 1)
            if step:
                np.testing.assert_array_equal(stored[a.start - 1], action[step - 1])


def test_the_instruction_stands_before_the_first_action_and_is_no_pair(tmp_path):
    write_bridge(tmp_path, [{"steps": 2, "cameras": [0], "text": "hebe 鍋"}, {"steps": 1, "cameras": [0], "text": ""}])
    samples, _ = read("bridge", tmp_path)
    first = samples["ep00-0000"]
    kinds = [(s.slice, s.modality.name) for s in first.segments]
    assert kinds[:4] == [(0, "VISION"), (0, "STATE"), (0, "TEXT"), (0, "ACTION")]
    assert kinds[4:] == [(1, "VISION"), (1, "STATE"), (1, "ACTION")]
    (words,) = by_kind(first, Modality.TEXT)
    assert words.text == "hebe 鍋" and words.pair == -1 and first.members["txt"].decode() == "hebe 鍋"
    assert not by_kind(samples["ep01-0000"], Modality.TEXT)
    assert samples["ep01-0000"].flags == {"instruction: absent": 1} and not first.flags


def test_clips_carry_the_clock_of_their_episode(tmp_path):
    write_bridge(tmp_path, [{"steps": 6, "cameras": [0]}])
    samples, _ = read("bridge", tmp_path, slices=2, rows_per_slice=2)
    assert list(samples) == ["ep00-0000", "ep00-0004"]
    clocks = Clocks.from_bytes(samples["ep00-0004"].members[CLOCKS])
    assert (clocks.log, clocks.kind, clocks.origin_ns) == ("ep00", "synthetic", 4 * PERIOD_NS)
    for times_ns in clocks.times_ns.values():
        assert (times_ns + clocks.origin_ns == np.arange(6) * PERIOD_NS).all()
    state = by_kind(samples["ep00-0000"], Modality.STATE)
    assert [s.timestamp_ns for s in state] == [0, 2 * PERIOD_NS]
    held = load_array(samples["ep00-0000"].members["state.npy"], "x")
    assert [held[s.stop - 1, 0] for s in state] == [0, 4]


def test_an_episode_shorter_than_the_chunk_is_padded_and_marked(tmp_path):
    """The table ends with the episode; what is beyond it must be masked, not made up."""
    write_bridge(tmp_path / "in", [{"steps": 3, "cameras": [0]} for _ in range(4)])
    manifest, printed = run("bridge", tmp_path / "in", tmp_path / "out")
    read_everything(tmp_path / "out", manifest)
    assert manifest.clock == "synthetic" and "clock: synthetic" in printed
    tokenizer = ActionTokenizer(ActionConfig(chunk=8), manifest.vectors["ACTION"])
    _, action = tables(tmp_path / "in", "ep00")
    (sample, *_) = read("bridge", tmp_path / "in")[0].values()
    table = load_array(sample.members["actions.npy"], "x")
    for number, segment in enumerate(by_kind(sample, Modality.ACTION)):
        chunk, mask = tokenizer.chunk_of(table, segment.start, segment.stop)
        valid = mask if mask.ndim == 1 else mask.any(axis=1)
        assert valid.tolist() == [True] * (3 - number) + [False] * (5 + number)
        np.testing.assert_array_equal(chunk[valid], action[number:])


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda folder: (folder / "image_0_01.jpg").unlink(), "missing file"),
        (lambda folder: (folder / "steps.npz").unlink(), "unreadable steps"),
        (lambda folder: (folder / "steps.npz").write_bytes(b"PK broken"), "unreadable steps"),
        (lambda folder: np.savez(folder / "steps.npz", state=np.zeros((4, 7))), "unreadable steps"),
        (
            lambda folder: np.savez(folder / "steps.npz", state=np.zeros((3, 7)), action=np.zeros((4, 7))),
            "unreadable steps",
        ),
    ],
)
def test_a_broken_episode_is_refused_alone(tmp_path, break_it, reason):
    write_bridge(tmp_path, [{"steps": 4, "cameras": [0]}, {"steps": 4, "cameras": [0]}])
    break_it(tmp_path / "ep01")
    samples, refused = read("bridge", tmp_path)
    assert set(samples) == {"ep00-0000"} and refused["ep01-0000"].reason == reason


def test_unknown_cameras_and_malformed_lines_are_refused(tmp_path):
    write_bridge(tmp_path, [{"steps": 2, "cameras": [0, 1]}, {"steps": 2, "cameras": [0]}])
    text = (tmp_path / "episodes.jsonl").read_text()
    (tmp_path / "episodes.jsonl").write_text(text + '{"episode": "ep02", "steps": "2", "cameras": []}\n')
    samples, refused = read("bridge", tmp_path, cameras={"0": None})
    assert [s.camera for s in by_kind(samples["ep01-0000"], Modality.VISION)] == [-1, -1]
    assert refused["ep00"].reason == "unknown camera" and refused["ep02"].reason == "malformed row"


@pytest.mark.real_data
def test_real_episodes(tmp_path, shared_data):
    manifest, printed = run("bridge", shared_data / "robot/bridge_debug_val", tmp_path / "out")
    counts = read_everything(tmp_path / "out", manifest)
    assert sum(n for (_, kind), n in counts.items() if kind == "VISION") == 25 * 10 * 3
    assert sum(n for (_, kind), n in counts.items() if kind == "TEXT") == 25 and not manifest.quarantined
    recordings = {s: {i.recordings[r] for i, r in rows(tmp_path / "out", manifest, s)} for s in manifest.splits}
    assert len(recordings["heldout"]) == 4 and not recordings["heldout"] & recordings["train"]
    assert manifest.vectors["ACTION"].period_ns == PERIOD_NS and "gripper" in printed


@pytest.mark.real_data
def test_real_actions_are_the_change_of_the_state(shared_data):
    """action[t] ~ state[t + 1] - state[t] in the pose; the gripper is where it shall be. So action t belongs to t."""
    samples, _ = read("bridge", shared_data / "robot/bridge_debug_val")
    by_shift = {shift: [] for shift in (-1, 0, 1)}
    for sample in samples.values():
        state = load_array(sample.members["state.npy"], "x")
        action = load_array(sample.members["actions.npy"], "x")
        change = np.diff(state[:, :6], axis=0)
        for shift, pairs in by_shift.items():
            at = np.arange(1, 8)
            pairs.append(np.stack([action[at + shift, :6], change[at]]))
        assert np.isin(action[:, 6].round(), (0, 1)).all() and np.abs(action[:, 6]).max() <= 1
    match = {s: np.corrcoef(*np.concatenate(p, axis=1).reshape(2, -1))[0, 1] for s, p in by_shift.items()}
    # The arm lags, so the change still shows the action before; it cannot show the one after.
    assert match[0] > 0.85 and match[0] > match[-1] and match[0] > match[1] + 0.1
