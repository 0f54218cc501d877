"""Audio clips with words in trees and manifests; what is stated of an audio clip must be so."""

import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from mmoe.data.load.media import audio_info, load_audio, load_resampled
from mmoe.errors import DataError
from mmoe.preparation.sources.encode import audio_piece
from mmoe.schema.modality import Modality
from mmoe.tokenizers.rates import resampled_length
from tests.data.recordings import write_jsonl
from tests.data.recordings_audio import RATE, tone, write_librispeech, write_manifest
from tests.data.test_media import compressed, overcounting, varied
from tests.preparation.sources.test_sources import read, texts


def decoded(sample):
    (audio,) = [segment for segment in sample.segments if segment.modality is Modality.AUDIO]
    return load_audio(sample.members[audio.member], audio.start, audio.stop, "x")[0]


@pytest.mark.parametrize("by, names", [("speaker", {"19", "84"}), ("chapter", {"19/198", "84/7", "84/8"})])
def test_a_librispeech_tree_gives_each_line_its_audio(tmp_path, by, names):
    audio = write_librispeech(tmp_path, {19: (198,), 84: (7, 8)})
    samples, refused = read("audio_text", tmp_path, tree_recording=by)
    assert not refused and set(samples) == set(audio) and {s.recording for s in samples.values()} == names
    for key, wave in audio.items():
        assert texts(samples[key]) == [f"WORDS OF {key.rpartition('/')[2]}"] and samples[key].recording in key
        np.testing.assert_allclose(decoded(samples[key]), wave / 32768, atol=1e-6)
        audio, words = samples[key].segments
        assert (audio.rate, audio.pair, words.pair, audio.slice) == (RATE, 0, 0, -1)


def test_lines_and_audio_of_a_tree_without_partner_are_refused(tmp_path):
    audio = list(write_librispeech(tmp_path, {19: (198,)}, utterances=4))
    transcript = tmp_path / "19/198/19-198.trans.txt"
    lines = transcript.read_bytes().splitlines(keepends=True)
    (tmp_path / f"{audio[1]}.flac").unlink()
    transcript.write_bytes(lines[0] + lines[1] + lines[2].split()[0] + b"\n" + b"\xff X\n")
    samples, refused = read("audio_text", tmp_path)
    assert set(samples) == {audio[0]}
    assert refused[audio[1]].reason == "missing file" and "19-198.trans.txt, line 2" in str(refused[audio[1]])
    assert refused[audio[2]].reason == "empty text"
    assert refused[f"{audio[3]}.flac"].reason == "audio without transcript"
    assert refused[f"{transcript}, line 4"].reason == "text is not UTF-8"


def test_a_manifest_gives_files_and_pieces_of_files(tmp_path):
    rows = [
        {"audio_filepath": "w/a.wav", "text": "whole", "duration": 1.0},
        {"audio_filepath": "w/b.flac", "text": "first", "duration": 0.25, "offset": 0},
        {"audio_filepath": "w/b.flac", "text": "second", "duration": 0.5, "offset": 0.3125},
        {"audio_filepath": "w/b.flac", "text": "to the end", "offset": 0.75},
        {"audio_filepath": "w/c.wav", "text": "no duration", "speaker": "ada"},
    ]
    write_manifest(tmp_path / "train.v1.jsonl", rows)
    samples, refused = read("audio_text", tmp_path / "train.v1.jsonl")
    assert not refused and list(samples) == [f"train_v1-{i:06d}" for i in range(5)]
    assert [texts(s) for s in samples.values()] == [[row["text"]] for row in rows]
    assert [s.recording for s in samples.values()] == ["w/a.wav", *["w/b.flac"] * 3, "speaker-ada"]
    assert samples["train_v1-000000"].members["audio.wav"] == (tmp_path / "w/a.wav").read_bytes()
    for row, sample in zip(rows[1:4], list(samples.values())[1:4]):
        start = round(row["offset"] * RATE)
        stop = start + round(row.get("duration", 1 - row["offset"]) * RATE)
        theirs, _ = soundfile.read(tmp_path / "w/b.flac", start=start, stop=stop, dtype="float32")
        np.testing.assert_array_equal(decoded(sample), theirs)
        assert len(sample.members["audio.flac"]) < (tmp_path / "w/b.flac").stat().st_size


def test_a_row_may_state_the_length_in_the_header_of_an_mp3_or_what_is_there(tmp_path):
    rate, made = 16_000, varied(2, 16_000)
    data = overcounting(compressed(made, rate, "MP3"), 1)
    (tmp_path / "a.mp3").write_bytes(data)
    found = audio_info(data, "x")[0]
    with soundfile.SoundFile(tmp_path / "a.mp3") as file:
        header = file.frames
    assert found < header
    rows = [{"audio": "a.mp3", "text": "x", "samples": samples} for samples in (found, header, header + 1)]
    write_jsonl(tmp_path / "transcripts.jsonl", rows)
    samples, refused = read("audio_text", tmp_path)
    assert len(samples) == 2 and [r.reason for r in refused.values()] == ["audio differs from its row"]
    rows = [{"audio_filepath": "a.mp3", "text": "x", "duration": n / rate} for n in (found, header, header + 400)]
    write_jsonl(tmp_path / "m.jsonl", rows)
    samples, refused = read("audio_text", tmp_path / "m.jsonl")
    assert [sample.segments[0].stop for sample in samples.values()] == [found, found] and len(refused) == 1


@pytest.mark.parametrize("rate", [44_100, 16_000])
def test_the_pieces_of_a_recording_are_resampled_as_the_whole_is(tmp_path, rate):
    """A recording cut by offsets: at every usual rate its pieces are the recording's, sample by sample."""
    rng, seconds = np.random.default_rng(0), 4
    wave = (4000 * rng.normal(size=seconds * rate)).astype(np.int16)
    soundfile.write(tmp_path / "long.wav", wave, rate)
    cuts = [0, *sorted(rng.integers(1, len(wave), 6).tolist()), len(wave)]
    rows = [
        {
            "audio_filepath": "long.wav",
            "text": f"part {start}",
            "offset": start / rate,
            "duration": (stop - start) / rate,
        }
        for start, stop in pairwise(cuts)
    ]
    write_jsonl(tmp_path / "m.jsonl", rows)
    samples, refused = read("audio_text", tmp_path / "m.jsonl")
    assert not refused
    for target in (8000, 11_025, 24_000, 48_000):
        whole = torchaudio.functional.resample(torch.from_numpy(wave / np.float32(2**15)), rate, target).numpy()
        pieces = []
        for sample in samples.values():
            segment = sample.segments[0]
            data = sample.members[segment.member]
            pieces.append(load_resampled(data, segment.start, segment.stop, target, "x"))
        for piece, start in zip(pieces, cuts):
            at = resampled_length(start, rate, target)
            assert len(piece) and np.abs(piece - whole[at : at + len(piece)]).max() < 1e-6


@pytest.mark.parametrize(
    "stated, fault",
    [
        ({"duration": 1.2}, r"a\.wav lasts 1\.000 s, .*, line 1 asks for 0\.000 s to 1\.200 s"),
        ({"duration": 0.9}, r"a\.wav lasts 1\.000 s, .*, line 1 says 0\.900 s"),
        ({"duration": 0.6, "offset": 0.5}, "asks for 0.500 s to 1.100 s; the file is truncated"),
        ({"offset": 1.5}, "asks for 1.500 s to 1.000 s"),
    ],
)
def test_an_audio_clip_whose_length_differs_from_its_row_is_refused(tmp_path, stated, fault):
    rows = [{"audio_filepath": "a.wav", "text": "x", **stated}, {"audio_filepath": "b.wav", "text": "y"}]
    write_manifest(tmp_path / "m.jsonl", rows)
    samples, refused = read("audio_text", tmp_path / "m.jsonl")
    assert set(samples) == {"m-000001"}
    assert refused["m-000000"].reason == "audio differs from its row"
    with pytest.raises(DataError, match=fault):
        raise refused["m-000000"]
    assert set(read("audio_text", tmp_path / "m.jsonl", duration_tolerance_s=0.21)[0]) == (
        {"m-000001"} if stated.get("offset", 0) > 1 else {"m-000000", "m-000001"}
    )


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x", "duration": 1},
        {"audio_filepath": "a.wav", "text": "x", "duration": "1.0"},
        {"audio_filepath": "a.wav", "text": "x", "offset": -1},
        {"audio_filepath": "a.wav", "text": "x", "duration": float("nan")},
        {"audio_filepath": "a.wav", "duration": 1},
    ],
)
def test_malformed_rows_of_a_manifest_are_refused(tmp_path, row):
    soundfile.write(tmp_path / "a.wav", tone(0, RATE), RATE)
    write_jsonl(tmp_path / "m.jsonl", [row, {"audio_filepath": "a.wav", "text": "x"}])
    samples, refused = read("audio_text", tmp_path / "m.jsonl")
    assert list(samples) == ["m-000001"] and refused["m-000000"].reason == "malformed row"


def test_a_folder_without_words_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0), RATE)
    with pytest.raises(DataError, match="holds neither transcripts.jsonl nor metadata.*trans.txt"):
        read("audio_text", tmp_path)


@pytest.mark.parametrize("subtype, kept", [("PCM_16", 16), ("PCM_24", 24), ("FLOAT", 24)])
def test_a_piece_keeps_the_bits_of_its_file(subtype, kept):
    wave = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 48_000, format="WAV", subtype=subtype)
    theirs, _ = soundfile.read(io.BytesIO(buffer.getvalue()), start=100, stop=300, always_2d=True)
    ours, rate = soundfile.read(io.BytesIO(audio_piece(buffer.getvalue(), 100, 300, "x")[0]), always_2d=True)
    assert rate == 48_000 and ours.shape == (200, 2)
    np.testing.assert_allclose(ours, theirs, atol=0 if subtype.startswith("PCM") else 2.0 ** (1 - kept))
    with pytest.raises(DataError, match="x ends after 400 of 500 samples"):
        audio_piece(buffer.getvalue(), 100, 500, "x")


@pytest.mark.real_data
def test_an_annotated_duration_that_is_wrong_is_found(tmp_path, shared_data):
    """LJ050-0131.wav lasts 7.658 s; the annotation that came with it says 7.58 s."""
    file = shared_data / "audio_text/speech/LJ050-0131.wav"
    row = {"audio_filepath": str(file), "text": "unless a system is established", "duration": 7.58}
    write_jsonl(tmp_path / "m.jsonl", [row, row | {"duration": 7.66}, row | {"offset": 1.0, "duration": 2.0}])
    samples, refused = read("audio_text", tmp_path / "m.jsonl")
    assert set(samples) == {"m-000001", "m-000002"} and "lasts 7.658 s" in str(refused["m-000000"])
    assert {s.recording for s in samples.values()} == {str(file)}
    assert len(decoded(samples["m-000002"])) == 2 * 22_050


@pytest.mark.real_data
def test_spoken_digits_are_read_by_take_and_speech_by_file(shared_data):
    samples, refused = read("audio_text", shared_data / "audio_text/fsdd")
    assert len(samples) == 300 and set(refused) == {"speakers_metadata.py.txt"}
    assert {s.recording for s in samples.values()} == {f"take-{i}" for i in range(5, 10)}
    samples, refused = read("audio_text", shared_data / "audio_text/speech")
    assert {key: s.segments[0].stop for key, s in samples.items()} == {"jfk": 485_100, "LJ050-0131": 168_861}
