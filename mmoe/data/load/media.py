"""Decode payloads, the bytes of an image or an audio clip, into arrays.

Every loader takes `where`, the name of the payload in messages (file or tar, and key), and raises DataError with
it for bytes that cannot be used. Nothing is guessed and no reader replaces another silently.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from mmoe.data.load.mp3 import with_count
from mmoe.data.load.reading import reading
from mmoe.errors import DataError
from mmoe.schema.bounds import check_bound
from mmoe.tokenizers.rates import resampled_length, resampling_range

# Images are opened as these alone: Pillow knows 40 kinds, some by running other programs (EPS starts Ghostscript).
# What phones write as MPO is a JPEG with a second image behind it; PPM stands for PBM, PGM and PNM too.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What names of such files end in, in lower case; what they are, their bytes say.
_SUFFIXES = "avif avifs bmp gif jpg jpeg jpe jfif png apng pbm pgm pnm ppm pfm tif tiff webp"
IMAGE_SUFFIXES = tuple(f".{suffix}" for suffix in _SUFFIXES.split())

_ORIENTATION = 0x0112  # EXIF tag, and TIFF's own; values 5 to 8 turn the image by a quarter
_TIFF_SIDES = (256, 257)  # tags of the width and the height that are stored
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 1 << 22  # pixels that are converted at once: some conversions take many times the image's memory
Image.MAX_IMAGE_PIXELS = None  # `image_pixels` of `mmoe.schema.bounds` stands in its place, and has a key to raise it

_VALUES_AT_ONCE = 1 << 20  # of an audio clip: its header may state far more than its bytes hold
# Bytes a sample of encodings that do not compress, in containers that hold them plainly.
_PLAIN_AUDIOS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF")
_WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}

_OGG_PAGE = 255 * 4096  # samples of a page at most: of packets, and of the half of Vorbis's largest block
_MP3_SPARE = 2 * 1152  # samples of two frames: encoders count in what they pad with, and what decoders take off

_SPARE = 2  # an image is decoded at no less than twice the size it is then resized to: a filter needs neighbors


def load_image(data: bytes, where: str, least: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image as uint8 [H, W, 3]: upright (EXIF), transparent parts over white, 16 bits scaled to 8.

    Of an animation the first frame. `least` (height, width): a JPEG more than `_SPARE` times as large may come out at
    a half, a quarter or an eighth of its size, which its decoder gives at a fraction of the cost.
    """
    with _image(data, where) as image:
        if least is not None and image.format == "JPEG":
            height, width = least[::-1] if _orientation(image) >= 5 else least
            image.draft(image.mode, (_SPARE * width, _SPARE * height))
        # Pillow turns TIFF as it loads it.
        turn = None if isinstance(image, TiffImageFile) else _TURNS.get(_orientation(image))
        image.load()
        return _rgb(image if turn is None else image.transpose(turn), where)


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, from its header alone."""
    with _image(data, where) as image:
        # Pillow states some TIFFs turned already, by version and by where their orientation stands.
        width, height = (image.tag_v2[tag] for tag in _TIFF_SIDES) if isinstance(image, TiffImageFile) else image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def image_format(data: bytes, where: str) -> str:
    """Return the kind of an image, as the suffix of a file: one of `IMAGE_FORMATS` in lower case."""
    with _image(data, where) as image:
        kind = image.format
        assert kind is not None  # it was read from a file
        return {"MPO": "jpeg"}.get(kind, kind.lower())


@contextmanager
def _image(data: bytes, where: str) -> Iterator[Image.Image]:
    """An image that is opened, its size checked, and not yet decoded."""
    with (
        reading("image", where, "replace it with a readable PNG or JPEG, or leave it out"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of odd metadata, without the name of the file
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:  # whose message quotes an address in memory
            raise ValueError(f"it is none of {', '.join(IMAGE_FORMATS)}") from error
        with image:
            check_bound("image_pixels", image.width * image.height, where, "is an image with too many pixels")
            yield image


def _orientation(image: Image.Image) -> int:
    """How the image is to be turned, 1 to 8 as EXIF numbers it; 1 (as it is) for what is no such number."""
    if image.format == "PNG":
        image.load()  # EXIF may stand behind the pixels; what is wrong with those is to be said
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except Exception:  # EXIF that cannot be read says nothing of the image, which may be good
        return 1


def reduced_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (height, width) that a frame of this size is converted to: `least`; None: it is no larger."""
    return least if size != least and all(side >= wanted for side, wanted in zip(size, least, strict=True)) else None


@contextmanager
def open_audio(data: bytes, where: str) -> Iterator[soundfile.SoundFile]:
    """Open an audio clip and check its header: what it states is within the bounds, and fits into its bytes."""
    with (
        reading("audio clip", where, "give a whole WAV, FLAC, OGG or MP3 file, or leave it out"),
        _opened(data) as audio,
    ):
        if audio.samplerate < 1:
            raise ValueError(f"a sample rate of {audio.samplerate} Hz")
        check_bound("audio_rate", audio.samplerate, where, "has too many samples a second")
        check_bound("audio_channels", audio.channels, where, "has too many channels")
        check_bound("audio_seconds", audio.frames / audio.samplerate, where, "says that it lasts too many seconds")
        width = _WIDTHS.get(audio.subtype, 0) if audio.format in _PLAIN_AUDIOS else 0
        if audio.frames < 0 or audio.frames * width * audio.channels > len(data):
            raise ValueError(f"its header states {audio.frames} samples, which {len(data)} bytes cannot hold")
        yield audio


def _opened(data: bytes) -> soundfile.SoundFile:
    audio = soundfile.SoundFile(io.BytesIO(data))
    if audio.format == "MP3" and (counted := with_count(data, audio.frames)) is not data:
        audio.close()
        return soundfile.SoundFile(io.BytesIO(counted))
    return audio


def audio_blocks(audio: soundfile.SoundFile, start: int, stop: int, dtype: str) -> Iterator[np.ndarray]:
    """Yield samples [start, stop) of every channel in blocks [n, channels]; fewer where the audio ends before."""
    at, most = _seek_before(audio, start), max(1, _VALUES_AT_ONCE // audio.channels)
    while at < stop:
        block = audio.read(min(stop - at, most), dtype=dtype, always_2d=True)
        if not len(block):
            return
        at += len(block)
        if at > start:
            yield block[-(at - start) :]


def _seek_before(audio: soundfile.SoundFile, start: int) -> int:
    """Go to a sample at or before `start` from where decoding is exact; returns its number.

    libsndfile seeks in MP3 of varying bit rate by a coarse table, and in the last page of Ogg Vorbis to other samples.
    """
    at = start
    if audio.format == "MP3":
        at = 0
    elif audio.subtype == "VORBIS":
        at = min(start, max(0, audio.frames - _OGG_PAGE))
    audio.seek(at)
    return at


def audio_info(data: bytes, where: str) -> tuple[int, int]:
    """Return samples per channel and sample rate in Hz: of MP3 by decoding, else from the header."""
    with open_audio(data, where) as audio:
        return audio.frames - _overcounted(audio), audio.samplerate


def stated_samples(data: bytes, where: str) -> int:
    """Return the samples per channel by the header, which in MP3 may be up to two frames more than `audio_info` has."""
    with open_audio(data, where) as audio:
        return audio.frames


def _overcounted(audio: soundfile.SoundFile) -> int:
    """How many samples per channel an MP3's header counts that are not there, up to two frames; else 0."""
    if audio.format != "MP3":
        return 0
    missing = audio.frames - sum(len(block) for block in audio_blocks(audio, 0, audio.frames, "float32"))
    return missing if missing < _MP3_SPARE else 0  # else it is truncated: who reads it to its end says so


def load_audio(data: bytes, start: int, stop: int, where: str) -> tuple[np.ndarray, int]:
    """Decode samples [start, stop) as float32 mono [n] in [-1, 1] (channels are averaged), and the rate in Hz."""
    with open_audio(data, where) as audio:
        return _mean_of_channels(audio, start, stop, stop, where), audio.samplerate


def load_resampled(data: bytes, start: int, stop: int, rate: int, where: str) -> np.ndarray:
    """Decode samples [start, stop) as `load_audio` does, at `rate` Hz [n]: as they are in the whole clip resampled.

    The filter needs samples from around the piece; n is the difference of the `resampled_length` of its ends.
    """
    from mmoe.tokenizers.audio import resample  # only here: preparation's workers need no torch

    with open_audio(data, where) as audio:
        found = audio.samplerate
        first, last = resampling_range(start, stop, found, rate)
        wave = _mean_of_channels(audio, first, stop, min(last, max(audio.frames, stop)), where)
    begin, from_begin, to_end = (resampled_length(sample, found, rate) for sample in (first, start, stop))
    return resample(wave, found, rate)[from_begin - begin : to_end - begin].numpy()


def _mean_of_channels(audio: soundfile.SoundFile, start: int, stop: int, last: int, where: str) -> np.ndarray:
    """Samples [start, last) f32 [n]; fewer where the audio ends before, but not before `stop`."""
    check_bound("array_bytes", 4 * (last - start), where, f"has samples {start} to {last}, too many bytes as float32")
    wave, found = np.empty(max(last - start, 0), np.float32), 0
    for block in _whole_blocks(audio, start, stop, where, last):
        wave[found : found + len(block)] = block.mean(axis=1)
        found += len(block)
    return wave[:found]


def audio_levels(data: bytes, start: int, stop: int, where: str) -> tuple[float, float]:
    """Return the level (RMS) of samples [start, stop) as `load_audio` gives them, and that of their loudest channel."""
    with open_audio(data, where) as audio:
        heard, each = 0.0, np.zeros(audio.channels)
        for block in _whole_blocks(audio, start, stop, where):
            heard += float(np.square(block.mean(axis=1), dtype=np.float64).sum())
            each += np.square(block, dtype=np.float64).sum(axis=0)
    count = max(stop - start, 1)
    return math.sqrt(heard / count), math.sqrt(each.max(initial=0.0) / count)


def _whole_blocks(
    audio: soundfile.SoundFile, start: int, stop: int, where: str, last: int | None = None
) -> Iterator[np.ndarray]:
    """Samples [start, stop), and up to `last` where there are more, in blocks f32 [n, channels].

    Raises DataError where some before `stop` are missing, or one is no number.
    """
    found = 0
    for block in audio_blocks(audio, start, stop if last is None else last, "float32"):
        check_finite(block, start + found, where)
        yield block
        found += len(block)
    if found < stop - start:
        raise DataError(
            f"{where}: samples {start} to {stop} are asked for, the audio ends after {start + found}; it is "
            "truncated or not the audio that was indexed: restore it or prepare the source again"
        )


def check_finite(wave: np.ndarray, start: int, where: str) -> None:
    """Raise DataError for samples [n] or [n, channels], the first of them number `start`, that are no numbers."""
    if not np.isfinite(wave).all():
        sample = start + int(np.argwhere(~np.isfinite(wave))[0, 0])
        raise DataError(f"{where}: sample {sample} is not finite; repair the recording or leave it out")


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    """A decoded image as uint8 [H, W, 3]."""
    width, height = image.size
    rows = max(1, _STRIP // max(width, 1))
    if rows >= height:
        return _strip_rgb(image, where)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _strip_rgb(strip, where)
    return pixels


def _strip_rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode == "F":
        raise DataError(f"{where} holds floating-point pixels, whose range is unknown; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel (some decoders widen them to 32)
        grey = np.asarray(image)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 0xFFFF:
            raise DataError(f"{where} holds pixels of more than 16 bits, whose range is unknown; convert it to 16 bits")
        grey = ((grey.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
