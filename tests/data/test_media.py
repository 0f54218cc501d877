"""Payload loaders against what was written, against each other, and on bytes that are broken."""

import io
import math
import struct
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image

from mmoe.data.load import media
from mmoe.data.load.media import audio_info, image_size, load_audio, load_image, load_resampled
from mmoe.data.load.mp3 import with_count
from mmoe.data.load.reading import reading
from mmoe.data.load.tables import load_array
from mmoe.errors import DataError, Refused
from mmoe.preparation.sources.encode import audio_piece
from tests.data.recordings import images, npy, png, wav


def test_grey_color_and_palette_images_become_rgb():
    color = images(1)[0]
    grey = color[:, :, 0]
    assert (load_image(png(color), "x") == color).all()
    assert (load_image(png(grey), "x") == grey[:, :, None]).all()
    assert (load_image(png(grey > 100), "x") == np.where(grey > 100, 255, 0)[:, :, None]).all()
    few = (color // 128) * 255
    assert (load_image(png(few, "P"), "x") == few).all()


def test_transparency_is_laid_over_white():
    rgba = np.dstack([images(1)[0], np.zeros((48, 64), np.uint8)])
    rgba[:24, :, 3] = 255
    rgba[24:, 32:, 3] = 51
    shown = load_image(png(rgba), "x")
    assert (shown[:24] == rgba[:24, :, :3]).all() and (shown[24:, :32] == 255).all()
    mixed = rgba[24:, 32:, :3] * 0.2 + 255 * 0.8
    assert np.abs(shown[24:, 32:] - mixed).max() <= 1
    palette = png(np.array([[0, 200]], np.uint8), "P", transparency=0)
    assert load_image(palette, "x").tolist() == [[[255] * 3, [200] * 3]]
    grey_alpha = png(np.array([[[10, 0], [10, 255]]], np.uint8))
    assert load_image(grey_alpha, "x").tolist() == [[[255] * 3, [10] * 3]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535, 100]], np.uint16)
    assert load_image(png(values), "x")[0, :, 0].tolist() == [0, 1, 128, 255, 0]


def turned(pixels, kind, orientation, place, **options):
    """The image as a file whose orientation stands in the EXIF block, in TIFF's own tag or in XMP."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    said = (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    )
    if place == "xmp":
        options |= {"tiffinfo": {700: said}} if kind == "TIFF" else {"xmp": said}
    else:
        options |= {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, place, options",
    [
        ("PNG", "exif", {}),
        ("WEBP", "exif", {"lossless": True}),
        ("WEBP", "xmp", {"lossless": True}),
        ("TIFF", "tag", {}),
        ("TIFF", "tag", {"compression": "tiff_lzw"}),
        ("TIFF", "xmp", {}),
        ("TIFF", "xmp", {"compression": "tiff_lzw"}),
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_planned(orientation, kind, place, options):
    upright = images(1)[0][:20]
    # EXIF 2.32, table of tag 0x0112: how row 0 and column 0 of the stored image lie in the upright one.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = turned(stored, kind, orientation, place, **options)
    assert (load_image(data, "x") == upright).all()
    assert image_size(data, "x") == upright.shape[:2] == (20, 64)


@pytest.mark.parametrize("data", [b"", b"no image", png(images(1)[0])[:-200]])
def test_a_broken_image_is_named(data):
    with pytest.raises(DataError, match=r"pic\.png cannot be read as an image \(.+\); replace"):
        load_image(data, "pic.png")


def test_images_of_unknown_range_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="floating-point pixels"):
        load_image(buffer.getvalue(), "x")


def test_audio_is_averaged_over_channels_and_cut_exactly():
    stereo = np.stack([np.arange(500) * 20, 3000 - np.arange(500) * 8], axis=1)
    data = wav(stereo, rate=11_025)
    assert audio_info(data, "x") == (500, 11_025)
    whole, rate = load_audio(data, 0, 500, "x")
    assert whole.dtype == np.float32 and rate == 11_025
    np.testing.assert_allclose(whole, stereo.mean(1) / 32768, atol=1e-7)
    piece, _ = load_audio(data, 123, 321, "x")
    assert (piece == whole[123:321]).all()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_is_read_as_it_was_written(subtype):
    wave = np.sin(np.arange(4000) / 20) * 0.5
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 8000, format="FLAC", subtype=subtype)
    np.testing.assert_allclose(load_audio(buffer.getvalue(), 100, 4000, "x")[0], wave[100:], atol=2**-15)
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    with pytest.raises(DataError, match="^a.flac"):
        load_audio(half, 0, 4000, "a.flac")


def test_broken_short_and_infinite_audio_are_named():
    with pytest.raises(DataError, match=r"a\.wav cannot be read as an audio clip"):
        audio_info(b"RIFFxxxx", "a.wav")
    with pytest.raises(DataError, match=r"a\.wav: samples 0 to 200 are asked for, the audio ends after 100"):
        load_audio(wav(np.zeros(100)), 0, 200, "a.wav")
    buffer = io.BytesIO()
    wave = np.zeros(50, np.float32)
    wave[17] = np.nan
    soundfile.write(buffer, wave, 8000, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="sample 17 is not finite"):
        load_audio(buffer.getvalue(), 10, 50, "a.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_a_log_is_named_by_row_and_column(bad):
    table = np.zeros((20, 3), np.float32)
    table[7, 2] = table[9, 0] = bad
    with pytest.raises(
        DataError, match=rf"drive\.imu\.npy: row 7, column 2 is {bad} \(2 such values\); drop or repair"
    ):
        load_array(npy(table), "drive.imu.npy")


def test_tables_are_numeric_with_two_axes():
    table = np.arange(6, dtype=np.float64).reshape(3, 2)
    assert (load_array(npy(table), "x") == table).all()
    for wrong in (np.zeros(4), np.array([["a"]]), np.zeros((2, 2), bool)):
        with pytest.raises(DataError, match="rows and dimensions"):
            load_array(npy(wrong), "x")
    for broken in (b"", npy(table)[:-3], npy(np.array([[{}]], object))):
        with pytest.raises(DataError, match="cannot be read as a table"):
            load_array(broken, "x")


@pytest.mark.parametrize(("refusal", "kind"), [("", DataError), ("unreadable image or video", Refused)])
def test_what_a_decoder_raises_is_one_line_that_keeps_letters(refusal, kind):
    with pytest.raises(DataError) as found, reading("video", "k.mp4", "leave it out", refusal):
        raise ValueError("Error: no 'ü映.mp4'\x00\nhere at 0x7f12")
    assert type(found.value) is kind
    assert str(found.value) == "k.mp4 cannot be read as a video (no 'ü映.mp4' here); leave it out"


def varied(seconds, rate):
    """Noise in one part and silence in another, so that a varying bit rate varies [n] f32."""
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)
    third = len(wave) // 3
    wave[third : third + third // 2] += np.random.default_rng(0).normal(0, 0.1, third // 2)
    wave[2 * third : 2 * third + third // 2] = 0
    return wave.astype(np.float32)


def compressed(wave, rate, kind, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, **options)
    return buffer.getvalue()


def overcounting(mp3, frames):
    """The MP3 whose Xing header counts so many frames more."""
    at = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    return mp3[:at] + struct.pack(">I", struct.unpack(">I", mp3[at : at + 4])[0] + frames) + mp3[at + 4 :]


def decoded_by_ffmpeg(data):
    with av.open(io.BytesIO(data)) as file:
        return np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_whose_header_counts_up_to_two_frames_too_many_is_read(mode):
    made = compressed(varied(3, 44_100), 44_100, "MP3", bitrate_mode=mode, compression_level=0.5)
    assert audio_info(made, "x") == (3 * 44_100, 44_100)
    for frames in (1, 2):
        data = overcounting(made, frames)
        theirs = decoded_by_ffmpeg(data)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            assert 0 < file.frames - len(theirs) < 2 * 1152
        assert audio_info(data, "x") == (len(theirs), 44_100)
        for ours in (load_audio(data, 0, len(theirs), "x")[0], flac(data, 0, len(theirs))):
            assert np.abs(ours - theirs).max() < 1e-4
    with pytest.raises(DataError, match="the audio ends after .* it is truncated"):
        cut = made[: len(made) * 2 // 3]
        load_audio(cut, 0, audio_info(cut, "x")[0], "x")


def uncounted(mp3):
    """The MP3 without its first frame, which counts the others."""
    return mp3[mp3.index(mp3[:2], max(mp3.find(b"Xing"), mp3.find(b"Info"))) :]


@pytest.mark.parametrize("rate", [44_100, 16_000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_does_not_count_its_frames_is_read_to_its_end(rate, mode):
    """libsndfile guesses by the first bit rate and the size: a fifth of the audio was read, or all was refused."""
    bare = uncounted(compressed(varied(4, rate), rate, "MP3", bitrate_mode=mode, compression_level=0.5))
    cover = b"ID3\x03\0\0" + bytes([0, 0, 100, 0]) + bytes(100 << 7)
    for data in (bare, cover + bare, bare + b"TAG" + bytes(125), cover + bare + b"TAG" + bytes(125)):
        theirs = decoded_by_ffmpeg(data)
        samples, found = audio_info(data, "x")
        assert found == rate and len(theirs) - samples in (0, 529)  # what a decoder is late by, which may be taken off
        assert np.abs(load_audio(data, 0, samples, "x")[0] - theirs[-samples:]).max() < 1e-4
        piece, _ = load_audio(data, 3 * rate, 3 * rate + 999, "x")
        assert np.abs(piece - theirs[-samples:][3 * rate : 3 * rate + 999]).max() < 1e-4
    second = bare.index(bare[:2], len(bare) // 2)
    torn = audio_info(bare[:second] + bytes(500) + bare[second:], "x")[0]
    assert abs(torn - samples) <= 4 * 1152  # decoders find the next frame, and lose a few
    cut = bare[: len(bare) // 2]
    assert audio_info(cut, "x")[0] < 0.8 * samples and with_count(b"\xff\xfb", 0) == b"\xff\xfb"


def flac(data, start, stop):
    return load_audio(audio_piece(data, start, stop, "x")[0], 0, stop - start, "x")[0]


@pytest.mark.parametrize(
    "kind, rate, options",
    [
        ("MP3", 16_000, {"bitrate_mode": "VARIABLE", "compression_level": 0.5}),
        ("MP3", 44_100, {"bitrate_mode": "CONSTANT"}),
        ("OGG", 44_100, {"subtype": "VORBIS"}),
        ("OGG", 48_000, {"subtype": "OPUS"}),
        ("FLAC", 44_100, {}),
        ("WAV", 44_100, {"subtype": "MS_ADPCM"}),
    ],
)
def test_a_piece_of_an_audio_clip_is_that_of_decoding_it_from_the_start(kind, rate, options, monkeypatch):
    """libsndfile seeks elsewhere in MP3 of varying bit rate, and in the last page of Ogg Vorbis."""
    data = compressed(varied(12, rate), rate, kind, **options)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        whole = file.read(dtype="float32")
    starts = [0, 1, 2940, rate, *range(len(whole) // 3, len(whole) - 1000, len(whole) // 7), len(whole) - 1000]
    for page in (255 * 4096, 8 * rate):  # the second: so that it is sought in a file as short as this
        monkeypatch.setattr(media, "_OGG_PAGE", page)
        for start in starts:
            piece, _ = load_audio(data, start, start + 1000, "x")
            assert np.abs(piece - whole[start : start + 1000]).max() < 1e-6
            assert np.abs(flac(data, start, start + 1000) - piece).max() < 2**-15


@pytest.mark.parametrize(
    "rate, target",
    [(44_100, 8000), (48_000, 16_000), (16_000, 8000), (22_050, 24_000), (8000, 44_100), (11_025, 8000), (8000, 8000)],
)
def test_audio_resampled_piece_by_piece_is_the_whole_resampled(rate, target):
    """torchaudio resamples the whole; without what is around a piece its ends differ by up to a fifth of full scale."""
    rng, count = np.random.default_rng(rate), 2 * rate + 123
    tone, noise = 0.3 * np.sin(np.arange(count) * 2 * np.pi * 300 / rate), rng.normal(0, 0.1, count)
    cuts = [0, *sorted(rng.integers(1, count, 9).tolist()), count]
    for wave in (tone.astype(np.float32), noise.astype(np.float32)):
        data = compressed(wave, rate, "WAV", subtype="FLOAT")
        whole = torchaudio.functional.resample(torch.from_numpy(wave), rate, target).numpy()
        pieces = [load_resampled(data, start, stop, target, "x") for start, stop in pairwise(cuts)]
        joined = np.concatenate(pieces)
        assert len(joined) == math.floor(Fraction(count * target, rate) + Fraction(1, 2))
        assert np.abs(joined - whole[: len(joined)]).max() < 1e-6
    with pytest.raises(DataError, match=f"the audio ends after {count}"):
        load_resampled(data, 10, count + 1, target, "x")
    assert len(load_resampled(data, 0, 1, target, "x")) == math.floor(target / rate + 0.5)
