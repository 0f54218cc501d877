"""Payloads: bytes of a picture, a sound or a table -> arrays; those of films are in `frames.py`.

Every loader takes `where`, the name of the payload in messages (file or tar, and key), and raises DataError with
it for bytes that cannot be used. Nothing is guessed and no reader replaces another silently.
"""

import io
import re

import numpy as np
import soundfile
from PIL import Image, ImageOps

from mmoe.errors import DataError

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 turn the picture by a quarter
_SPARE = 2  # a picture is decoded at no less than twice the size it is then resized to: a filter needs neighbours


def load_image(data: bytes, where: str, least: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright (EXIF orientation), transparent parts over white, 16 bits scaled to 8.

    `least` (height, width): a JPEG more than `_SPARE` times as large may come out at a half, a quarter or an eighth of
    its size, which its decoder gives at a fraction of the cost.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if least is not None and image.format == "JPEG":
                height, width = least[::-1] if image.getexif().get(_ORIENTATION, 1) >= 5 else least
                image.draft(image.mode, (_SPARE * width, _SPARE * height))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image, where)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("picture", where, error, "replace it with a readable PNG or JPEG, or leave it out") from error


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, from its header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("picture", where, error, "replace it with a readable PNG or JPEG, or leave it out") from error
    return (width, height) if turned else (height, width)


def reduced_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int] | None:
    """The whole fraction of a frame's (height, width) that is no less than `_SPARE` times `least`; None: all of it."""
    fraction = min(side // (_SPARE * wanted) for side, wanted in zip(size, least, strict=True))
    return (size[0] // fraction, size[1] // fraction) if fraction > 1 else None


def audio_info(data: bytes, where: str) -> tuple[int, int]:
    """Samples per channel and sample rate in Hz, from the header."""
    with _sound(data, where) as sound:
        return sound.frames, sound.samplerate


def load_audio(data: bytes, start: int, stop: int, where: str) -> tuple[np.ndarray, int]:
    """Samples [start, stop) as float32 mono [n] in [-1, 1] (channels are averaged), and the rate in Hz."""
    with _sound(data, where) as sound:
        rate = sound.samplerate
        try:
            sound.seek(start)
            wave = sound.read(stop - start, dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            raise _unreadable("sound", where, error, "restore the recording or leave it out") from error
    if len(wave) < stop - start:
        raise DataError(
            f"{where}: samples {start} to {stop} are asked for, the sound ends after {start + len(wave)}; it is "
            "truncated or not the sound that was indexed: restore it or prepare the source again"
        )
    if not np.isfinite(wave).all():
        sample = start + int(np.flatnonzero(~np.isfinite(wave))[0])
        raise DataError(f"{where}: sample {sample} is not finite; repair the recording or leave it out")
    return wave, rate


def load_array(data: bytes, where: str) -> np.ndarray:
    """A table of readings, float or integer [rows, dimensions], from ``.npy`` bytes. Refuses NaN and infinity."""
    try:
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable("table", where, error, "write it with numpy.save, without objects") from error
    if table.ndim != 2 or table.dtype.kind not in "fiu":
        raise DataError(
            f"{where} holds {table.dtype} of shape {list(table.shape)}; a table of readings is numeric with two axes, "
            "rows and dimensions"
        )
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{where}: row {row}, column {column} is {table[row, column]} ({len(wrong)} such values); "
            "drop or repair these readings before preparing"
        )
    return table


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode == "F":
        raise DataError(f"{where} holds floating-point pixels, whose range is unknown; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel (some decoders widen them to 32)
        grey = np.asarray(image).astype(np.int64)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 0xFFFF:
            raise DataError(f"{where} holds pixels of more than 16 bits, whose range is unknown; convert it to 16 bits")
        return np.repeat(((grey * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _sound(data: bytes, where: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _unreadable("sound", where, error, "give a WAV, FLAC, OGG or MP3 file, or leave it out") from error


def _unreadable(what: str, where: str, error: Exception, remedy: str) -> DataError:
    # A message may quote the whole file; the sentence keeps the readable end of the first line.
    reason = re.sub(r"Error opening <.*?>: ", "", re.sub(r"[^\x20-\x7e]+", " ", str(error)))
    reason = reason.strip().removeprefix("Error: ")
    reason = reason if len(reason) <= 160 else f"...{reason[-160:]}"
    return DataError(f"{where} cannot be read as a {what} ({reason or type(error).__name__}); {remedy}")
