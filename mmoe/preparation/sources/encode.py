"""Encodes members that readers make themselves: images out of videos, pieces of audio clips, tables.

H, W: height and width in pixels; N: readings, D: dimensions of one; n: samples of an audio clip.
"""

import math
from io import BytesIO

import numpy as np
import soundfile
from PIL import Image

from mmoe.data.load.media import audio_blocks, check_finite, open_audio
from mmoe.data.load.reading import reading
from mmoe.errors import DataError
from mmoe.schema.bounds import check_bound
from mmoe.schema.channels import heard_channel, to_mono

_FLAC_CHANNELS = 8  # at most
_AROUND_S = 0.01  # more than the filters reach that resample audio to 1000 Hz or more
_GRID_HZ = 25  # all usual rates are multiples of it
_WIDE = {"PCM_24", "PCM_32", "FLOAT", "DOUBLE"}  # more than 16 bits a sample; FLAC keeps 24 of them


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode an image u8 [H, W, 3] as JPEG with colors at full resolution (4:4:4)."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_table(table: np.ndarray) -> bytes:
    """Encode a table of readings [N, D] as float32 ``.npy``."""
    buffer = BytesIO()
    np.save(buffer, table.astype(np.float32))
    return buffer.getvalue()


def encode_flac(wave: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    """Encode samples [n] or [n, channels] (float in [-1, 1], or int16/int32 over their whole range) as FLAC.

    `rate` is in Hz, `subtype` the width as soundfile names it.
    """
    buffer = BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def range_around(start: int, stop: int, samples: int, rate: int) -> tuple[int, int]:
    """Give what to store of a recording of so many samples, for its piece [start, stop) to be resampled as in it.

    That is `_AROUND_S` on either side, from a place on where samples of every usual rate stand at once.
    """
    around, grid = math.ceil(_AROUND_S * rate), rate // math.gcd(rate, _GRID_HZ)
    return max(0, start - around) // grid * grid, min(samples, stop + around)


def audio_piece(audio: bytes, start: int, stop: int, where: str) -> tuple[bytes, str]:
    """Cut samples [start, stop) out of an audio clip; returns the bytes and the suffix of the format; raises DataError.

    That is FLAC at its own width up to 24 bits; WAV of 32-bit floats where floats exceed full scale, which FLAC clips.
    Every channel is kept, unless one is chosen (`hearing`); more than FLAC holds are averaged, as training hears them.
    """
    check_bound("array_bytes", 8 * (stop - start), where, f"has samples {start} to {stop}, too many bytes to cut out")
    with open_audio(audio, where) as file:
        subtype = "PCM_24" if file.subtype in _WIDE else "PCM_16"
        floats = file.subtype in ("FLOAT", "DOUBLE")
        # As integers where the file has them (no rounding); libsndfile does not scale floats to integers.
        dtype = "int32" if file.subtype.startswith("PCM") else "float64"
        rate, mixes = file.samplerate, file.channels > _FLAC_CHANNELS and heard_channel() == "mix"
        heard = mixes or heard_channel() != "mix"
        blocks = list(audio_blocks(file, start, stop, "float64" if mixes else dtype))
    found = sum(map(len, blocks))
    if found < stop - start:
        raise DataError(f"{where} ends after {start + found} of {stop} samples; it is truncated: restore it")
    wave = np.concatenate([to_mono(block, where) if heard else block for block in blocks])
    check_finite(wave, start, where)
    with reading("audio clip", where, "convert it to a rate and a width that FLAC can hold, or leave it out"):
        if floats and np.abs(wave).max(initial=0) > 1:
            buffer = BytesIO()
            soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
            return buffer.getvalue(), ".wav"
        return encode_flac(wave, rate, "PCM_24" if mixes else subtype), ".flac"
