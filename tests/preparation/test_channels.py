"""Which channel of audio is heard, and silence that is counted: the same in every reader that reads audio."""

import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from mmoe.data.load.media import load_audio
from mmoe.errors import DataError
from mmoe.schema.channels import CANCELLED, SILENT
from mmoe.schema.modality import Modality
from tests.data.recordings import write_jsonl
from tests.preparation.test_prepare import payload, quarantine, rows, run

RATE, COUNT = 8000, 4
NO_CODEC = {"heldout_share": 0, "audio": {"kind": "mimi"}}  # nothing is fitted to silence


def tones(number, seconds=1.0):
    """Left and right of opposite phase [n, 2] i16."""
    left = 12_000 * np.sin(np.arange(int(seconds * RATE)) * 0.01 * (number + 3))
    return np.stack([left, -left], axis=1).astype(np.int16)


def write_files(folder, suffix=".wav", names="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        soundfile.write(folder / (names.format(number) + suffix), tones(number), RATE)


def transcripts(folder):
    write_files(folder)
    write_jsonl(folder / "transcripts.jsonl", [{"audio": f"{n}.wav", "text": f"word {n}"} for n in range(COUNT)])
    return "audio_text", folder


def audiofolder(folder):
    write_files(folder, ".flac")
    lines = ["file_name,transcription", *(f"{n}.flac,word {n}" for n in range(COUNT))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return "audio_text", folder


def ljspeech(folder):
    write_files(folder / "wavs", names="LJ-{}")
    (folder / "metadata.csv").write_text("".join(f"LJ-{n}|word {n}|word {n}\n" for n in range(COUNT)))
    return "audio_text", folder


def texts_beside(folder):
    write_files(folder)
    for number in range(COUNT):
        (folder / f"{number}.txt").write_text(f"word {number}")
    return "audio_text", folder


def tree(folder):
    for number in range(COUNT):
        place = folder / str(number) / "1"
        place.mkdir(parents=True)
        soundfile.write(place / "u.flac", tones(number), RATE)
        (place / "x.trans.txt").write_text(f"u WORD {number}\n")
    return "audio_text", folder


def pieces(folder):
    write_files(folder)
    row = {"duration": 0.5, "offset": 0.25}
    write_jsonl(folder / "m.jsonl", [{"audio_filepath": f"{n}.wav", "text": f"word {n}"} | row for n in range(COUNT)])
    return "audio_text", folder / "m.jsonl"


def videos(folder):
    folder.mkdir()
    for number in range(COUNT):
        with av.open(str(folder / f"{number}.mkv"), "w") as file:
            seen, heard = file.add_stream("mpeg4", 25), file.add_stream("pcm_s16le", rate=RATE, layout="stereo")
            seen.width = seen.height = 32
            seen.pix_fmt = "yuv420p"
            packets = []
            for at in range(25):
                image = np.full((32, 32, 3), 60 * number + at, np.uint8)
                packets += seen.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
                part = tones(number)[at * RATE // 25 : (at + 1) * RATE // 25]
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part).reshape(1, -1), "s16", "stereo")
                frame.sample_rate, frame.pts, frame.time_base = RATE, at * RATE // 25, Fraction(1, RATE)
                packets += heard.encode(frame)
            for packet in [*packets, *seen.encode(), *heard.encode()]:
                file.mux(packet)
    return "video", folder


READERS = [transcripts, audiofolder, ljspeech, texts_beside, tree, pieces, videos]


def stored(folder, manifest):
    """Channels of the member, and what training hears, of every audio segment of the training part."""
    for index, row in rows(folder, manifest, "train"):
        for segment in index.row_segments(row):
            if segment["modality"] == Modality.AUDIO:
                data, where = payload(index, row, segment)
                with soundfile.SoundFile(io.BytesIO(data)) as file:
                    yield file.channels, load_audio(data, int(segment["start"]), int(segment["stop"]), where)[0], data


def is_part(wave, whole):
    """Whether some stretch of `whole` is `wave`."""
    numbers, all_numbers = np.rint(wave * 2**15).astype(int), whole.astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(all_numbers, len(numbers))
    return bool((windows == numbers).all(axis=1).any())


@pytest.mark.parametrize("write", READERS)
def test_channels_that_cancel_out_are_counted_and_one_of_them_can_be_chosen(tmp_path, write):
    kind, path = write(tmp_path / "in")
    manifest, said = run(kind, path, tmp_path / "mix", prepare=NO_CODEC)
    segments = list(stored(tmp_path / "mix", manifest))
    assert len(segments) >= COUNT and all(not wave.any() for _, wave, _ in segments)
    flagged = manifest.splits["train"].flagged
    assert {flag: count for flag, count in flagged.items() if "absent" not in flag} == {CANCELLED: len(segments)}
    assert f"flagged: {CANCELLED}" in said
    silent = rf"{len(segments)} clips are silent, since their channels.*; (prepare\.\w+)=(\w+) \(or"
    option, value = re.search(silent, " ".join(said.split())).groups()
    assert option == "prepare.audio_channel" and value == "left"
    for channel, which in (("left", 0), ("right", 1), (1, 1)):
        out = tmp_path / str(channel)
        manifest, _ = run(kind, path, out, prepare=NO_CODEC | {"audio_channel": channel})
        assert not {CANCELLED, SILENT} & manifest.splits["train"].flagged.keys()
        found = list(stored(out, manifest))
        assert len(found) == len(segments) and all(channels == 1 for channels, _, _ in found)
        assert all(any(is_part(wave, tones(n)[:, which]) for n in range(COUNT)) for _, wave, _ in found)


_LACKS = r"has 2 channels, numbered from 0; set prepare\.audio_channel to one below 2, or to mix"


@pytest.mark.parametrize("write", [transcripts, pieces])
def test_a_channel_that_an_audio_clip_lacks_is_refused_with_the_key_that_asked(tmp_path, write):
    kind, path = write(tmp_path / "in")
    soundfile.write(tmp_path / "in" / "0.wav", np.tile(tones(0), 2), RATE)  # has four
    manifest, _ = run(kind, path, tmp_path / "out", prepare=NO_CODEC | {"audio_channel": 3})
    assert manifest.splits["train"].samples == 1 and manifest.quarantined == {"no such audio channel": COUNT - 1}
    assert all(re.search(_LACKS, line["message"]) for line in quarantine(tmp_path / "out"))


def test_a_channel_that_the_audio_of_a_video_lacks_is_refused(tmp_path):
    kind, path = videos(tmp_path / "in")
    with pytest.raises(DataError, match=_LACKS):
        run(kind, path, tmp_path / "out", prepare=NO_CODEC | {"audio_channel": 3})


def test_clips_of_videos_that_cancel_out_are_left_out_under_their_own_name(tmp_path):
    kind, path = videos(tmp_path / "in")
    manifest, said = run(kind, path, tmp_path / "out", prepare=NO_CODEC, silent_audio="leave_out")
    assert manifest.splits["train"].flagged == {f"{CANCELLED}, left out": COUNT, "audio: absent": 2 * COUNT}
    assert f"{COUNT} clips are silent, since their channels" in " ".join(said.split())


def test_silence_is_counted_in_every_reader_and_audio_of_one_channel_is_what_it_is(tmp_path):
    for write in (transcripts, pieces):
        kind, path = write(tmp_path / write.__name__)
        folder = path if path.is_dir() else path.parent
        soundfile.write(folder / "1.wav", np.zeros(RATE, np.int16), RATE)
        soundfile.write(folder / "2.wav", tones(9)[:, 0], RATE)
        soundfile.write(folder / "3.wav", np.tile(tones(5)[:, :1], (1, 2)), RATE)
        manifest, said = run(kind, path, tmp_path / f"{write.__name__}-out", prepare=NO_CODEC | {"audio_channel": 1})
        assert manifest.splits["train"].flagged == {SILENT: 1} and "channels" not in said
        assert manifest.splits["train"].samples == COUNT
        manifest, _ = run(kind, path, tmp_path / f"{write.__name__}-mix", prepare=NO_CODEC)
        assert manifest.splits["train"].flagged == {SILENT: 1, CANCELLED: 1}


def test_a_mix_that_coding_keeps_from_zero_is_found_too(tmp_path):
    kind, path = transcripts(tmp_path / "in")
    for number in range(COUNT):
        left = 0.3 * np.sin(np.arange(RATE) * 0.3) * np.linspace(0, 1, RATE) + number * 1e-3
        (path / f"{number}.wav").unlink()
        soundfile.write(path / f"{number}.wav", np.stack([left, 1e-3 - left], axis=1), RATE, format="OGG")
    manifest, _ = run(kind, path, tmp_path / "out", prepare=NO_CODEC)
    assert all(np.abs(wave).max() > 0 for _, wave, _ in stored(tmp_path / "out", manifest))
    assert manifest.splits["train"].flagged == {CANCELLED: COUNT}


@pytest.mark.parametrize("channels", [2, 12])
def test_floats_beyond_full_scale_keep_their_peaks(tmp_path, channels):
    """What FLAC would clip: a channel that is chosen, a piece of a file, and both at once; of 12 channels the mean."""
    loud = np.random.default_rng(0).normal(size=(RATE, channels)).astype(np.float32)
    for write in (transcripts, pieces):
        kind, path = write(tmp_path / write.__name__)
        folder = path if path.is_dir() else path.parent
        for number in range(COUNT):
            soundfile.write(folder / f"{number}.wav", np.roll(loud, number, axis=0), RATE, subtype="FLOAT")
        for choice in ("mix", "left"):
            out = tmp_path / f"{write.__name__}-{choice}"
            manifest, _ = run(kind, path, out, prepare=NO_CODEC | {"audio_channel": choice})
            for number, (_, heard, _) in enumerate(stored(out, manifest)):
                wave = np.roll(loud, number, axis=0)
                wave = wave.mean(axis=1) if choice == "mix" else wave[:, 0]
                wave = wave[RATE // 4 : 3 * RATE // 4] if write is pieces else wave
                assert np.abs(wave).max() > 1
                np.testing.assert_allclose(heard, wave, atol=1e-6)


def test_more_channels_than_flac_holds_give_the_one_that_is_chosen(tmp_path):
    kind, path = pieces(tmp_path / "in")
    wave = np.random.default_rng(0).integers(-9000, 9000, (RATE, 12)).astype(np.int16)
    for number in range(COUNT):
        soundfile.write(path.parent / f"{number}.wav", np.roll(wave, number, axis=0), RATE)
    manifest, _ = run(kind, path, tmp_path / "out", prepare=NO_CODEC | {"audio_channel": 10})
    for number, (_, heard, _) in enumerate(stored(tmp_path / "out", manifest)):
        theirs = np.roll(wave, number, axis=0)[RATE // 4 : 3 * RATE // 4, 10]
        assert (np.rint(heard * 2**15) == theirs).all()
