"""Preparation of the real recordings: all of them taken, and each payload read back."""

import json

import pytest

from mmoe.schema.manifest import SPLITS
from tests.preparation.test_prepare import keys, payload, read_everything, rows, run


@pytest.mark.real_data
def test_real_text(shared_data, tmp_path):
    manifest, _ = run("text", shared_data / "text", tmp_path / "out")
    read_everything(tmp_path / "out", manifest)
    joined = {}
    for split in SPLITS:
        for index, row in rows(tmp_path / "out", manifest, split):
            data = payload(index, row, index.row_segments(row)[0])[0]
            assert len(data) <= 3000
            joined.setdefault(index.recordings[row], []).append(data)
    for name, parts in joined.items():
        assert b"".join(parts) == (shared_data / "text" / name).read_bytes()
    assert not manifest.quarantined and set(joined) == {"tinyshakespeare.txt", "wagahaiwa_nekodearu.ja.txt"}
    assert manifest.splits["heldout"].recordings == manifest.splits["train"].recordings == 2


@pytest.mark.real_data
def test_real_captions(shared_data, tmp_path):
    manifest, _ = run("image_caption", shared_data / "image_caption", tmp_path / "out")
    read_everything(tmp_path / "out", manifest)
    assert (manifest.splits["train"].samples, manifest.splits["heldout"].samples) == (14, 2)
    assert not manifest.quarantined


@pytest.mark.real_data
def test_real_spoken_digits(shared_data, tmp_path):
    manifest, _ = run("audio_text", shared_data / "audio_text/fsdd", tmp_path / "out")
    counts = read_everything(tmp_path / "out", manifest)
    assert (counts["train", "AUDIO"], counts["heldout", "AUDIO"]) == (240, 60)
    held = keys(tmp_path / "out", manifest, "heldout")
    assert all(key.endswith("_9") for key in held) and len({key.split("_")[1] for key in held}) == 6
    assert manifest.quarantined == {"file of another kind": 1}
    assert (tmp_path / "out" / "audio_codec.safetensors").is_file()
    error = json.loads((tmp_path / "out" / "audio_codec.json").read_text())["reconstruction_error"]
    assert error["2"] < error["1"] < 0.3


@pytest.mark.real_data
def test_real_speech(shared_data, tmp_path):
    manifest, _ = run("audio_text", shared_data / "audio_text/speech", tmp_path / "out")
    counts = read_everything(tmp_path / "out", manifest)
    assert counts["train", "AUDIO"] == counts["heldout", "AUDIO"] == 1


@pytest.mark.real_data
def test_real_donkeycar(shared_data, tmp_path):
    manifest, _ = run("donkeycar", shared_data / "robot/donkeycar_tub", tmp_path / "out")
    counts = read_everything(tmp_path / "out", manifest)
    # 700 frames: the last 15 % (105) held out, 2 s (40 frames) of gap, clips of 5.
    assert (counts["train", "VISION"], counts["heldout", "VISION"]) == (555, 105)
    assert manifest.quarantined == {"gap before the held-out tail": 8}
    assert keys(tmp_path / "out", manifest, "heldout")[0] == "donkeycar_tub-000595"
    stats = manifest.vectors["ACTION"]
    assert all(-1 <= low < high <= 1 for low, high in zip(stats.q01, stats.q99))
