"""The readers: what they find in a folder, and how they refuse what they cannot use."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.data.index.shards import check_key
from mmoe.data.load.tables import load_array
from mmoe.errors import ConfigError, DataError
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Refused
from mmoe.preparation.sources.donkeycar import PERIOD_NS
from mmoe.preparation.sources.encode import encode_flac
from mmoe.preparation.sources.text import cut_text
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera
from tests.data.recordings import (
    drive_records,
    images,
    png,
    wav,
    write_audio,
    write_captions,
    write_jsonl,
    write_tub,
)


def read(kind, path, **options):
    """Samples by key and refusals by key, as preparation sees them (items cross a process border)."""
    source = SOURCES.find(kind)
    refused, samples = {}, {}
    for item in list(source.items(path, source.config(**options), lambda key, refusal: refused.update({key: refusal}))):
        item = pickle.loads(pickle.dumps(item))
        try:
            samples[item.key] = item.make()
        except DataError as error:
            refused[item.key] = pickle.loads(pickle.dumps(error))
            continue
        assert (samples[item.key].key, samples[item.key].recording) == (item.key, item.recording)
    return samples, refused


def texts(sample):
    return [segment.text for segment in sample.segments if segment.modality is Modality.TEXT]


# text


@given(
    st.lists(st.sampled_from(["Wort ", "語。", "\r\n", "\n\n", "a. B", "é", "🚗", "x" * 40]), max_size=80).map("".join),
    st.integers(64, 200),
)
def test_cut_documents_are_the_file_again_and_whole_characters(text, max_bytes):
    data = text.encode()
    ranges = list(cut_text(data, max_bytes))
    documents = [data[start:stop] for start, stop in ranges]
    assert b"".join(documents) == data
    assert all(0 < len(d) <= max_bytes for d in documents)
    assert all(len(d) >= max_bytes // 2 for d in documents[:-1])
    for document in documents:
        document.decode()


def test_documents_end_at_the_best_border():
    body = "one two.\nthree four five six seven eight\n\nnine ten. eleven twelve thirteen fourteen"
    first, second = (body.encode()[a:b] for a, b in cut_text(body.encode(), 70))
    assert first.endswith(b"eight\n\n") and second.startswith(b"nine")


def test_text_files_keep_their_bytes(tmp_path):
    content = {"a.txt": "Zeile\r\n\r\n吾輩は猫である。\r\n" * 30, "sub/b.c.txt": "short", "empty.txt": ""}
    (tmp_path / "sub").mkdir()
    for name, text in content.items():
        (tmp_path / name).write_bytes(text.encode())
    samples, refused = read("text", tmp_path, max_bytes=100)
    assert not refused
    for name, text in content.items():
        mine = [s for s in samples.values() if s.recording == name]
        assert b"".join(s.members["txt"] for s in mine).decode() == text
        assert all(texts(s) == [s.members["txt"].decode()] for s in mine)
    assert "sub/b_c-000000" in samples and "a-000007" in samples
    alone, _ = read("text", tmp_path / "a.txt", max_bytes=100)
    assert {k: s.members for k, s in alone.items()} == {k: s.members for k, s in samples.items() if k.startswith("a-")}


def test_text_that_is_not_utf8_is_refused_with_its_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf" + b"\xe9 au lait")
    (tmp_path / "good.txt").write_bytes(b"good")
    good, bad = json.dumps({"text": "good"}).encode(), b'{"text": "caf\xe9"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, bad, good]))
    samples, refused = read("text", tmp_path)
    assert set(samples) == {"good-000000", "rows-000000", "rows-000002"}
    assert {refusal.reason for refusal in refused.values()} == {"text is not UTF-8"}
    assert "latin.txt: byte 3 (0xe9) is not UTF-8; convert" in str(refused["latin"])
    assert f"rows.jsonl: byte {len(good) + 1 + bad.index(0xE9)} (0xe9)" in str(refused["rows-000001"])


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "malformed row"),
        ('["text"]', "malformed row"),
        ('{"body": "x"}', "malformed row"),
        ('{"text": 3}', "malformed row"),
        ('{"text": " \\n"}', "empty text"),
        ('{"text": "\\ud83d"}', "text is not UTF-8"),
    ],
)
def test_unusable_lines_are_refused_alone(tmp_path, line, reason):
    (tmp_path / "rows.jsonl").write_text(f'{line}\n{{"text": "fine"}}\n')
    samples, refused = read("text", tmp_path)
    assert list(map(texts, samples.values())) == [["fine"]]
    (refusal,) = refused.values()
    assert refusal.reason == reason and "rows.jsonl" in str(refusal)


# image_caption


def test_images_come_with_their_caption_as_a_pair(tmp_path):
    write_captions(tmp_path, 3)
    samples, refused = read("image_caption", tmp_path)
    assert not refused and list(samples) == ["images/p0", "images/p1", "images/p2"]
    image, words = samples["images/p1"].segments
    assert (image.modality, image.height, image.width, image.slice, image.camera) == (2, 48, 64, -1, -1)
    assert (words.text, words.pair, image.pair) == ("Bild 1", 0, 0)
    assert samples["images/p1"].members == {
        "image.png": (tmp_path / "images/p1.png").read_bytes(),
        "txt": b"Bild 1",
    }


def test_further_captions_are_samples_of_the_same_recording(tmp_path):
    (tmp_path / "p.png").write_bytes(png(images(1)[0]))
    rows = [{"image": "p.png", "caption": "A", "second": "B"}, {"image": "q.png", "caption": "C", "second": None}]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples, refused = read("image_caption", tmp_path, columns={"caption": ("caption", "second")})
    assert {key: texts(s) for key, s in samples.items()} == {"p": ["A"], "p-1": ["B"]}
    assert {s.recording for s in samples.values()} == {"p"}
    assert refused["q"].reason == "missing file" and "q.png cannot be read" in str(refused["q"])


def test_files_have_keys_of_their_own_whatever_their_names_have_in_common(tmp_path):
    """Dots in names, one stem under two suffixes, several captions of one image: none of them is a duplicate."""
    names = ["set.v1/p.0.png", "set.v1/p_0.png", "set.v1/p%2E0.png", "a.png", "a.jpg", "a.b.png", "a+2.png", "./a.png"]
    for number, name in enumerate(names[:-1]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(images(1)[0] + number))
    rows = [{"image": name, "caption": f"caption {number}"} for number, name in enumerate([*names, "a.png"])]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples, refused = read("image_caption", tmp_path)
    assert not refused
    assert {key: sample.segments[-1].text for key, sample in samples.items()} == {
        "set.v1/p%2E0": "caption 0",
        "set.v1/p_0": "caption 1",
        "set.v1/p%252E0": "caption 2",
        "a": "caption 3",
        "a%2Ejpg": "caption 4",
        "a%2Eb": "caption 5",
        "a+2": "caption 6",
        "a+3": "caption 7",  # of a.png again, in another spelling
        "a+4": "caption 8",
    }
    assert {samples[key].recording for key in ("a", "a+3", "a+4")} == {"a"}
    for key in samples:
        check_key(key)


def test_further_captions_that_would_have_the_key_of_another_image_get_one_of_their_own(tmp_path):
    for name in ("a.png", "a-1.png"):
        (tmp_path / name).write_bytes(png(images(1)[0]))
    rows = [{"image": "a-1.png", "caption": "other"}, {"image": "a.png", "caption": "first", "more": "second"}]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples, refused = read("image_caption", tmp_path, columns={"caption": ("caption", "more")})
    assert not refused and {key: s.segments[-1].text for key, s in samples.items()} == {
        "a-1": "other",
        "a": "first",
        "a-1+2": "second",
    }


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "tree"])
def test_audio_files_with_dots_are_read(tmp_path, rows):
    folder = tmp_path / "1.0/2.5"
    folder.mkdir(parents=True)
    for name in ("u.1", "u_1"):
        (folder / f"{name}.flac").write_bytes(encode_flac(np.full(800, 0.1 if "." in name else 0.2, np.float32), 8000))
    if rows:
        names = [f"1.0/2.5/{name}.flac" for name in ("u.1", "u_1", "u.1")]
        write_jsonl(tmp_path / "transcripts.jsonl", [{"audio": n, "text": f"words {i}"} for i, n in enumerate(names)])
    else:
        (folder / "x.trans.txt").write_text("u.1 WORDS\nu_1 OTHERS\n")
    samples, refused = read("audio_text", tmp_path)
    assert not refused
    assert set(samples) == {"1.0/2.5/u%2E1", "1.0/2.5/u_1"} | ({"1.0/2.5/u%2E1+2"} if rows else set())


def test_rows_without_image_or_caption_are_refused(tmp_path):
    (tmp_path / "p.png").write_bytes(png(images(1)[0]))
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"caption": "A"},
        {"image": "p.png"},
        {"image": "p.png", "caption": ""},
        {"image": "broken.png", "caption": "B"},
    ]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples, refused = read("image_caption", tmp_path)
    assert not samples and "broken.png cannot be read as an image" in str(refused["broken"])
    assert any("line 1: 'image' is missing" in str(r) for r in refused.values())
    with pytest.raises(DataError, match="holds neither captions.jsonl nor metadata"):
        read("image_caption", tmp_path / "elsewhere")


# audio_text


def test_a_recording_is_a_take_else_a_speaker_else_a_file(tmp_path):
    rows = [
        {"audio": "w/a.wav", "text": "eins", "speaker": "ada", "take": 4},
        {"audio": "w/b.wav", "text": "zwei", "speaker": "ada"},
        {"audio": "w/c.wav", "text": "drei"},
    ]
    (tmp_path / "w").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / row["audio"]).write_bytes(wav(np.arange(100 + number), rate=16_000))
    write_jsonl(tmp_path / "transcripts.jsonl", rows)
    samples, refused = read("audio_text", tmp_path)
    assert not refused
    assert [s.recording for s in samples.values()] == ["take-4", "speaker-ada", "w/c"]
    audio, words = samples["w/b"].segments
    assert (audio.modality, audio.start, audio.stop, audio.rate, audio.pair) == (Modality.AUDIO, 0, 101, 16_000, 0)
    assert (words.text, words.pair) == ("zwei", 0)


def test_an_audio_clip_that_differs_from_its_row_is_refused(tmp_path):
    """A WAV that was cut off still opens; the row's count of samples tells."""
    write_audio(tmp_path, takes=1, speakers=("ada",))
    whole = (tmp_path / "one_ada_0.wav").read_bytes()
    (tmp_path / "one_ada_0.wav").write_bytes(whole[: len(whole) // 2])
    samples, refused = read("audio_text", tmp_path)
    assert set(samples) == {"two_ada_0"}
    assert refused["one_ada_0"].reason == "audio differs from its row"
    assert "says 8000; the file is truncated" in str(refused["one_ada_0"])


def test_an_unreadable_audio_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    write_jsonl(
        tmp_path / "transcripts.jsonl", [{"audio": "a.wav", "text": "x"}, {"audio": "b.wav", "text": "x", "take": "1"}]
    )
    samples, refused = read("audio_text", tmp_path)
    assert not samples and len(refused) == 2
    assert "a.wav cannot be read as an audio clip" in str(refused["a"])


# donkeycar


def test_clips_share_no_frame_and_know_the_actions_around_them(tmp_path):
    records = drive_records(23)
    write_tub(tmp_path / "tub", records)
    samples, refused = read("donkeycar", tmp_path / "tub", slices=5, lookahead=6)
    assert not refused and list(samples) == [f"tub-{i:06d}" for i in (0, 5, 10, 15, 20)]
    seen = []
    for first, sample in zip((0, 5, 10, 15, 20), samples.values()):
        table = load_array(sample.members["actions.npy"], "x")
        frames = [s for s in sample.segments if s.modality is Modality.VISION]
        actions = [s for s in sample.segments if s.modality is Modality.ACTION]
        for number, (frame, action) in enumerate(zip(frames, actions, strict=True)):
            index = first + number
            seen.append(index)
            assert sample.members[frame.member].endswith(b"%d" % index)
            assert (frame.height, frame.width, frame.camera) == (48, 64, Camera.FRONT)
            assert frame.slice == action.slice == number
            assert frame.timestamp_ns == action.timestamp_ns == number * PERIOD_NS and frame.offset_ns == 0
            ahead = np.array([[r["user/angle"], r["user/throttle"]] for r in records[index : first + len(frames) + 6]])
            np.testing.assert_allclose(table[action.start : action.stop], ahead, rtol=1e-6)
            if index:
                np.testing.assert_allclose(table[action.start - 1, 0], records[index - 1]["user/angle"], rtol=1e-6)
        assert {s.modality for s in sample.segments} == {Modality.VISION, Modality.ACTION}
    assert seen == list(range(23))


def test_clips_begin_anew_after_deleted_and_refused_records(tmp_path):
    records = drive_records(20)
    records[12]["user/angle"] = float("nan")
    records[13]["user/throttle"] = None
    write_tub(tmp_path / "tub", records, deleted=[3])
    samples, refused = read("donkeycar", tmp_path / "tub")
    lengths = {key: len(s.segments) // 2 for key, s in samples.items()}
    assert lengths == {"tub-000000": 3, "tub-000004": 5, "tub-000009": 3, "tub-000014": 5, "tub-000019": 1}
    table = load_array(samples["tub-000009"].members["actions.npy"], "x")
    assert len(table) == 1 + 3  # the record before; nothing beyond the fault
    assert refused["tub-12"].reason == "reading is not finite" and "'user/angle' is nan" in str(refused["tub-12"])
    assert refused["tub-13"].reason == "malformed row"


def test_a_missing_image_takes_its_clip_along(tmp_path):
    write_tub(tmp_path / "tub", drive_records(10))
    (tmp_path / "tub/images/7_cam_image_array_.jpg").unlink()
    samples, refused = read("donkeycar", tmp_path)
    assert set(samples) == {"tub-000000"} and refused["tub-000005"].reason == "missing file"


def test_a_folder_that_is_no_tub_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no manifest.json"):
        read("donkeycar", tmp_path)
    (tmp_path / "manifest.json").write_text("{}\n")
    with pytest.raises(DataError, match="cannot be read as a manifest of a tub v2"):
        read("donkeycar", tmp_path)


# the registry


def test_simulated_recordings_are_made_from_their_number(tmp_path):
    samples, refused = read("simulated_drive", tmp_path, recordings=2, slices=(1, 2))
    assert list(samples) == ["drive-000000", "drive-000001"] and not refused


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="'image_captions' is not a kind of source; did you mean image_caption"):
        SOURCES.find("image_captions")
    assert all(SOURCES.find(kind).kind == kind for kind in SOURCES.kinds())


def test_a_refusal_survives_the_way_from_a_worker():
    refusal = pickle.loads(pickle.dumps(Refused("class", "sentence")))
    assert (refusal.reason, str(refusal)) == ("class", "sentence")
