"""Bytes of members that readers make themselves: pictures out of videos, pieces of sounds, tables."""

from io import BytesIO

import numpy as np
import soundfile
from PIL import Image

from mmoe.errors import DataError

_WIDE = {"PCM_24", "PCM_32", "FLOAT", "DOUBLE"}  # more than 16 bits a sample; FLAC keeps 24 of them


def encode_jpeg(picture: np.ndarray, quality: int) -> bytes:
    """A picture u8 [H, W, 3] as JPEG with colours at full resolution (4:4:4)."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_table(table: np.ndarray) -> bytes:
    """A table of readings [N, D] as float32 ``.npy``."""
    buffer = BytesIO()
    np.save(buffer, table.astype(np.float32))
    return buffer.getvalue()


def encode_flac(wave: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    """Samples [n] or [n, channels] (float in [-1, 1], or int16/int32 over their whole range) as FLAC."""
    buffer = BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def flac_piece(sound: bytes, start: int, stop: int, where: str) -> bytes:
    """Samples [start, stop) of every channel of a sound, at its own width up to 24 bits. Raises DataError."""
    try:
        with soundfile.SoundFile(BytesIO(sound)) as file:
            file.seek(start)
            subtype = "PCM_24" if file.subtype in _WIDE else "PCM_16"
            # As integers where the file has them (no rounding); libsndfile does not scale floats to integers.
            dtype = "int32" if file.subtype.startswith("PCM") else "float64"
            wave, rate = file.read(stop - start, dtype=dtype, always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{where} cannot be read as a sound ({error}); restore it or leave it out") from error
    if len(wave) < stop - start:
        raise DataError(f"{where} ends after {start + len(wave)} of {stop} samples; it is truncated: restore it")
    return encode_flac(wave, rate, subtype)
