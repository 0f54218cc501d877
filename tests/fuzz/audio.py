"""Audio clips: WAV, FLAC, OGG and MP3 bytes, whole and in pieces."""

import io
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile

from mmoe.data.load.media import audio_info, audio_levels, load_audio, load_resampled
from mmoe.errors import MmoeError
from mmoe.preparation.sources.encode import audio_piece
from mmoe.tokenizers.audio import resample
from tests.fuzz.mutate import damage


def build(_: Path) -> Callable[[random.Random], bytes]:
    wave = 0.3 * np.sin(np.arange(4000) * 0.05)
    stereo = np.stack([wave, -wave], axis=1)
    kinds = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]
    kinds += [("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("WAV", "ALAW"), ("CAF", "ALAC_16")]
    seeds = []
    for number, (kind, subtype) in enumerate(kinds):
        buffer = io.BytesIO()
        soundfile.write(buffer, stereo if number % 2 else wave, 8000, format=kind, subtype=subtype)
        seeds.append(buffer.getvalue())
        if kind == "MP3":  # and one that does not count its frames
            whole = buffer.getvalue()
            seeds.append(whole[whole.index(whole[:2], max(whole.find(b"Xing"), whole.find(b"Info"))) :])
    return lambda rng: damage(rng.choice(seeds), seeds, rng)


def run(data: bytes, _: Path) -> None:
    samples, rate = audio_info(data, "s.wav")
    with suppress(MmoeError):
        audio_piece(data, samples // 4, samples // 2 + 1, "s.wav")
    wave, rate = load_audio(data, 0, samples, "s.wav")
    assert np.abs(wave).max(initial=0) < np.inf
    resample(wave, rate, 8000)
    audio_levels(data, samples // 2, samples, "s.wav")
    load_resampled(data, samples // 2, samples, 8000, "s.wav")
