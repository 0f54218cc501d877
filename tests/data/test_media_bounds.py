"""Images and audio clips that somebody else wrote: what their headers state is checked before it is believed."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmoe.data.load.media import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    audio_info,
    image_format,
    image_size,
    load_audio,
    load_image,
)
from mmoe.errors import DataError, Refused
from mmoe.preparation.sources.encode import audio_piece
from mmoe.schema.bounds import BEYOND, Bounds, bounded_by
from tests.data.recordings import images, png, wav


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation(kind, count, value):
    """An EXIF block with one entry, the orientation, of this type (3: short), count and value."""
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)


ODD = {
    "six": orientation(3, 1, struct.pack("<H", 6)),
    "zero": orientation(3, 1, struct.pack("<H", 0)),
    "nine": orientation(3, 1, struct.pack("<H", 9)),
    "ascii": orientation(2, 2, b"6\0"),
    "two shorts": orientation(3, 2, struct.pack("<HH", 6, 6)),
    "byte": orientation(1, 1, b"\x06"),
    "long": orientation(4, 1, struct.pack("<I", 6)),
    "undefined": orientation(7, 1, b"\x06"),
    "no value": orientation(3, 0, b""),
    "garbage": b"Exif\0\0II*\0" + b"\xff" * 8,
    "short": b"Exif\0\0II*\0\x08\0\0\0\x05\0",
    "rational": orientation(5, 1, struct.pack("<I", 0)),
}


def with_entry(tiff, entry):
    """The TIFF with this entry of its orientation (type, count, value) in place of its own."""
    at = tiff.index(struct.pack("<HHI", 0x0112, 3, 1))
    return tiff[:at] + entry + tiff[at + len(entry) :]


_CASES = [(kind, name) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") for name in ODD]
_NO_ENTRY = ("garbage", "short")  # damage of a block, which TIFF's own tags are not


@pytest.mark.parametrize("kind, name", [case for case in _CASES if case[0] != "TIFF" or case[1] not in _NO_ENTRY])
def test_an_image_has_the_size_that_is_planned_whatever_its_orientation_is(kind, name):
    """Whether a number of another type counts is Pillow's to say; that size and image agree is not."""
    if kind == "TIFF":
        data = with_entry(encoded(Image.new("RGB", (40, 20)), kind, tiffinfo={0x0112: 1}), ODD[name][16:28])
    else:
        block = ODD[name] if kind in ("JPEG", "AVIF") else ODD[name][6:]
        try:
            data = encoded(Image.new("RGB", (40, 20)), kind, exif=block)
        except (TypeError, KeyError, SyntaxError, struct.error, ZeroDivisionError):
            pytest.skip("Pillow writes no such AVIF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(data, "x") == load_image(data, "x").shape[:2]
    if name in ("six", "nine"):
        assert image_size(data, "x") == ((40, 20) if name == "six" else (20, 40))


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_images_of_every_kind_of_the_list_are_opened(kind):
    image = Image.fromarray(images(1)[0])
    data = encoded(image, kind)
    assert image_size(data, "x") == load_image(data, "x").shape[:2] == (48, 64)
    assert image_format(data, "x") == kind.lower()


def test_suffixes_of_images_are_those_that_pillow_knows():
    Image.init()
    assert sorted(IMAGE_SUFFIXES) == sorted(name for name, kind in Image.EXTENSION.items() if kind in IMAGE_FORMATS)


def test_phone_images_with_a_second_one_behind_are_jpegs():
    first, second = (Image.fromarray(p) for p in images(2))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert image_format(data, "x") == "jpeg" and load_image(data, "x").shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I"])
def test_images_are_converted_by_strips_to_the_same(mode, monkeypatch):
    pixels = images(1, 40, 30)[0]
    if mode.startswith("I"):
        image = Image.fromarray((pixels[:, :, 0].astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2"))
        image = image.convert("I") if mode == "I" else image
    elif mode == "PA":
        image = Image.fromarray(pixels).convert("P").convert(mode)
    else:
        image = Image.fromarray(pixels).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels[:, :, 1]))
    from mmoe.data.load import media

    whole = media._rgb(image, "x")
    monkeypatch.setattr(media, "_STRIP", 100)
    assert (media._rgb(image, "x") == whole).all() and whole.shape == (40, 30, 3)


def test_an_eps_named_as_a_jpeg_starts_no_interpreter(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto\nshowpage\n%%EOF\n"
    for read in (load_image, image_size, image_format):
        with pytest.raises(DataError, match=r"a\.jpg cannot be read as an image \(it is none of AVIF, BMP, GIF, JPEG"):
            read(data, "a.jpg")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_image_is_refused_by_its_header_when_it_is_too_large():
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for read in (load_image, image_size):
        with pytest.raises(Refused, match=r"10,000,000,000, the bound image_pixels is 128,000,000; raise") as x:
            read(data, "a.png")
        assert x.value.reason == BEYOND
    with bounded_by(Bounds(image_pixels=48 * 64 - 1)), pytest.raises(Refused):
        load_image(png(images(1)[0]), "x")
    with bounded_by(Bounds(image_pixels=48 * 64)):
        load_image(png(images(1)[0]), "x")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_images_and_audio_raise_nothing_but_errors_for_the_user(data):
    image = Image.fromarray(images(1, 16, 16)[0])
    kind = data.draw(st.sampled_from([*IMAGE_FORMATS, "WAV", "FLAC", "OGG", "DDS", "ICO"]))
    if kind in ("WAV", "FLAC", "OGG"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.sin(np.arange(900) / 9), 8000, format=kind)
        whole, readers = buffer.getvalue(), [audio_info, lambda d, w: load_audio(d, 10, 500, w)]
        readers.append(lambda d, w: audio_piece(d, 10, 500, w))
    else:
        whole, readers = encoded(image, kind), [image_size, load_image, image_format]
    damaged = bytearray(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    places = st.integers(0, len(damaged) - 1) | st.integers(0, min(60, len(damaged) - 1))
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        damaged[at] = byte
    for read in readers:
        try:
            read(bytes(damaged), "x")
        except DataError as error:
            assert str(error).startswith("x") and " at 0x" not in str(error)


def audio(wave, rate=8000, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_audio_clip_that_is_no_number_is_refused_whole_and_in_pieces(value):
    wave = np.zeros((4000, 2))
    wave[1000, 1] = value
    data = audio(wave, subtype="FLOAT")
    for read in (load_audio, audio_piece):
        with pytest.raises(DataError, match=r"x: sample 1000 is not finite"):
            read(data, 500, 2000, "x")
        read(data, 1001, 2000, "x")


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_piece_of_more_channels_than_flac_holds_is_what_training_hears(subtype):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 12))
    data = audio(wave, subtype=subtype)
    piece, _ = audio_piece(data, 100, 2100, "x")
    assert audio_info(piece, "x") == (2000, 8000)
    np.testing.assert_allclose(load_audio(piece, 0, 2000, "x")[0], load_audio(data, 100, 2100, "x")[0], atol=2**-22)


def test_an_audio_clip_is_read_in_blocks_to_the_same(monkeypatch):
    from mmoe.data.load import media

    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (5000, 3))
    for kind in ("WAV", "FLAC", "OGG"):
        data = audio(wave, kind=kind)
        whole, _ = load_audio(data, 17, 4900, "x")
        with monkeypatch.context() as patch:
            patch.setattr(media, "_VALUES_AT_ONCE", 1000)
            assert (load_audio(data, 17, 4900, "x")[0] == whole).all()


def test_a_header_that_states_more_than_an_audio_clip_can_have_is_refused():
    flac = bytearray(audio(np.zeros(4000), kind="FLAC"))
    at = flac.index(b"fLaC") + 8 + 13  # STREAMINFO: 4 bits of 36 that count the samples, then 32 more
    flac[at] |= 0x0F
    flac[at + 1 : at + 5] = b"\xff" * 4
    for read in (audio_info, lambda d, w: load_audio(d, 0, 2**36 - 1, w), lambda d, w: audio_piece(d, 0, 2**36 - 1, w)):
        with pytest.raises(Refused, match=r"x\.flac (says that it lasts|has samples)"):
            read(bytes(flac), "x.flac")
    fast = bytearray(wav(np.zeros(10)))
    fast[24:28] = struct.pack("<I", 2_000_000)
    with pytest.raises(Refused, match="2,000,000, the bound audio_rate is 768,000; raise prepare.bounds.audio_rate"):
        audio_info(bytes(fast), "x")
    fast[24:28] = bytes(4)
    with pytest.raises(DataError, match="cannot be read as an audio clip"):
        audio_info(bytes(fast), "x")
    with bounded_by(Bounds(audio_channels=2)), pytest.raises(Refused, match="too many channels"):
        audio_info(wav(np.zeros((10, 3))), "x")
