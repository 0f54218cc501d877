"""Audio to codes: a residual vector-quantized codec over log-mel frames, and the order codes are written in.

The codec is fitted by k-means, so it needs no training run and no download; `decode` makes a waveform one can
listen to. Pretrained neural codecs with the same interface stand in `mmoe.tokenizers.audio_codecs`.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load
from torch import Tensor

from mmoe.config.base import Address, Config
from mmoe.config.nature import Nature
from mmoe.errors import DataError, MissingFileError
from mmoe.files import Read, read_file
from mmoe.hashing import canonical_json
from mmoe.optional import needs
from mmoe.schema.channels import SILENT_RMS
from mmoe.tokenizers.kmeans import kmeans, nearest_centroid, sample_rows
from mmoe.tokenizers.rates import Count, check_rates, resampled_length

Layout = Literal["flat", "delay"]

FORMAT = "mmoe mel codec 2"
FORMAT_1 = "mmoe mel codec 1"  # still read: its `normalize_level` was spelled `normalise_level`
FIT_FRAMES = 100_000  # frames kept for k-means: a seeded uniform sample of all that pass by
LEVEL_RMS = 0.05  # of full scale; what `normalize_level` scales every wave to
POWER_FLOOR = 1e-5  # added to mel power before the logarithm: about 40 dB below a wave of LEVEL_RMS
PHASE_ITERATIONS = 32  # of Griffin-Lim


class MelConfig(Config):
    """Configures how the mel codec hears: fixed when it is fitted, and stored with it."""

    sample_rate: int = Field(8000, gt=0, le=768_000)  # Hz; other rates are resampled to it
    window: int = Field(256, ge=16, le=1 << 16)  # samples of one analysis window, and of its FFT
    hop: int = Field(80, gt=0, le=1 << 16)  # samples between analysis windows
    mels: int = Field(40, gt=0, le=1024)  # bands of the mel filter bank (HTK scale, 0 Hz to half the sample rate)
    stack: int = Field(4, gt=0, le=1024)  # analysis windows per code: the code rate is sample_rate / (hop * stack)
    codebook_size: int = Field(64, gt=1, le=1 << 16)  # codes per level
    normalize_level: bool = True  # scale every wave to one loudness first: codes then say nothing of the gain

    @model_validator(mode="after")
    def _shapes(self) -> "MelConfig":
        if self.hop > self.window // 2:
            raise ValueError(
                f"hop {self.hop} is more than half of window {self.window}, so a decoded wave would have "
                f"gaps; set hop <= {self.window // 2} or a longer window"
            )
        empty = int((mel_filters(self).amax(0) == 0).sum())
        if empty:
            raise ValueError(
                f"{empty} of {self.mels} mel bands hold no FFT bin of a window of {self.window} samples; "
                "set fewer mels or a longer window"
            )
        return self


class AudioConfig(Config):
    """Says which codec turns audio into ids."""

    kind: Literal["mel", "encodec", "dac", "mimi"] = "mel"  # mel: fitted by preparation; the others are pretrained
    # mel: the file of the fitted codec; else the local folder of the pretrained model. Compared by what it holds.
    path: Annotated[Address | None, Nature.OPERATIONAL] = None
    codebooks: int = Field(2, gt=0)  # residual levels; of a codec that has more, the first ones
    layout: Layout = "flat"  # order of the ids of one piece of audio, see `serialize`
    mel: MelConfig = Field(default_factory=MelConfig)  # kind mel: how it is fitted, and must have been


class AudioCodec(Protocol):
    """Encodes audio for the data: `codebooks` levels of `codebook_size` codes, `sample_rate` in Hz."""

    sample_rate: int
    codebooks: int
    codebook_size: int

    @property
    def fingerprint(self) -> str:
        """Give a digest that is equal for codecs that give equal codes."""

    def num_frames(self, samples: Count, rate: Count | int) -> Count:
        """Count the code frames of a wave of `samples` samples at `rate` Hz, exactly; elementwise over numpy arrays."""

    def encode(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """Encode mono f32 `wave` [n] in [-1, 1] at `rate` Hz as i64 codes [T, Q]."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [T, Q] to an f32 wave at `sample_rate`."""


class MelCodec:
    """Quantizes stacked, normalized log-mel frames by residual vectors.

    A frame is `stack` consecutive log-mel vectors, each band less its mean, over its standard deviation.
    Level 1 is the nearest of `codebook_size` centroids, level q the centroid nearest to what is left over by
    the levels before it.
    """

    def __init__(self, config: MelConfig, mean: Tensor, std: Tensor, centroids: Tensor) -> None:
        """`mean`, `std` [mels] of the log-mel bands; `centroids` [Q, K, stack * mels]; all f32."""
        self.config = config
        self.mean, self.std, self.centroids = mean, std, centroids
        self.sample_rate = config.sample_rate
        self.codebooks, self.codebook_size = centroids.shape[:2]
        self._samples_per_frame = config.hop * config.stack

    @classmethod
    def fit(cls, waves: Iterable[np.ndarray], config: AudioConfig, seed: int) -> "MelCodec":
        """Fit on mono f32 waves [n] at `config.mel.sample_rate`; deterministic in (waves, config, seed).

        Raises `DataError` when the waves hold fewer frames than a codebook has codes.
        """
        mel = config.mel
        heard = (log_mel(wave, mel.sample_rate, mel).numpy() for wave in waves)
        frames = torch.from_numpy(sample_rows(heard, FIT_FRAMES, seed))
        if len(frames) < mel.codebook_size:
            raise DataError(
                f"the audio codec cannot be fitted: {len(frames)} frames for a codebook of "
                f"{mel.codebook_size}; give it more audio or set a smaller tokenizers.audio.mel.codebook_size"
            )
        bands = rearrange(frames, "t (s m) -> (t s) m", s=mel.stack).double()
        mean, std = bands.mean(0).float(), bands.std(0).float().clamp_min(1e-3)
        residual = _standardize(frames, mean, std)
        generator = torch.Generator().manual_seed(seed)
        levels = []
        for _ in range(config.codebooks):
            levels.append(kmeans(residual, mel.codebook_size, generator))
            residual = residual - levels[-1][nearest_centroid(residual, levels[-1])]
        return cls(mel, mean, std, torch.stack(levels))

    @classmethod
    def load(cls, path: str | Path, codebooks: int | None = None, read: Read = read_file) -> "MelCodec":
        """Read what `save` wrote, with only its first `codebooks` levels where that is given."""
        try:
            content = read(str(path), "the audio codec")
        except MissingFileError:
            raise DataError(
                f"{path} does not exist: tokenizers.audio.path must name a fitted audio codec; prepare a "
                "source with audio to get one"
            ) from None
        try:
            tensors = load(content)
            length = int.from_bytes(content[:8], "little")  # of the header: JSON with the metadata
            metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        except (SafetensorError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an audio codec ({error}); fit it again") from error
        if metadata.get("format") == FORMAT_1:
            metadata["config"] = str(metadata.get("config")).replace('"normalise_level"', '"normalize_level"')
        elif metadata.get("format") != FORMAT:
            raise DataError(f"{path} has format {metadata.get('format')!r}, not {FORMAT!r}; fit the audio codec again")
        try:
            config = MelConfig.model_validate_json(metadata["config"])
        except ValidationError as error:
            raise DataError(f"{path} holds unknown settings ({error.errors()[0]['msg']}); fit it again") from error
        available = len(tensors["centroids"])
        if codebooks is not None and codebooks > available:
            raise DataError(
                f"{path} has {available} levels and tokenizers.audio.codebooks asks for {codebooks}; set "
                f"tokenizers.audio.codebooks <= {available} or fit the codec again"
            )
        return cls(config, tensors["mean"], tensors["std"], tensors["centroids"][:codebooks].contiguous())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the settings stand in its metadata."""
        save_file(self._arrays(), path, metadata={"format": FORMAT, "config": self.config.model_dump_json()})

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of settings and tensors: equal codecs give equal codes."""
        settings = self.config.model_dump()
        settings["normalise_level"] = settings.pop("normalize_level")  # as in format 1: checkpoints hold such digests
        digest = hashlib.sha256(canonical_json(settings))
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}{array.shape}".encode() + array.astype("<f4").tobytes())
        return digest.hexdigest()

    def num_frames(self, samples: Count, rate: Count | int) -> Count:
        """Count the code frames of a wave of `samples` samples at `rate` Hz: the last, partial frame counts."""
        return -(-resampled_length(samples, rate, self.sample_rate) // self._samples_per_frame)

    def encode(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """Encode mono f32 `wave` [n] in [-1, 1] at `rate` Hz as i64 codes [T, Q], T = num_frames(n, rate)."""
        residual = self._hear(wave, rate)
        codes = []
        for level in self.centroids:
            codes.append(nearest_centroid(residual, level))
            residual = residual - level[codes[-1]]
        return torch.stack(codes, dim=1).numpy()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [T, q] of the first q <= Q levels to an f32 wave [T * hop * stack]; phases by Griffin-Lim.

        The gain is lost where `normalize_level` took it away: the wave then has the level codes were made at.
        """
        frames, window = len(codes), self.config.window
        if frames == 0:
            return np.zeros(0, dtype=np.float32)
        bands = self._dequantize(codes) * self.std + self.mean  # [T * stack, mels], log power
        bands = (bands.exp() - POWER_FLOOR).clamp_min(0)
        power = (bands @ torch.linalg.pinv(mel_filters(self.config))).clamp_min(0).T
        power = torch.cat([power, power[:, -1:]], dim=1)  # the window centered on the end of the wave
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # griffinlim draws its first phases from the global generator
            wave = _torchaudio().griffinlim(
                power,
                torch.hann_window(window),
                n_fft=window,
                hop_length=self.config.hop,
                win_length=window,
                power=2.0,
                n_iter=PHASE_ITERATIONS,
                momentum=0.99,
                length=frames * self._samples_per_frame,
                rand_init=True,
            )
        return wave.numpy()

    def reconstruction_error(self, waves: Iterable[np.ndarray]) -> dict[int, float]:
        """Mean squared error of the normalized log-mel bands when the first 1, 2, .. Q levels are kept.

        `waves` as in `fit`. Near 1.0 is what predicting each band's mean would give.
        """
        error, count = torch.zeros(self.codebooks, dtype=torch.float64), 0
        for wave in waves:
            residual = self._hear(wave, self.sample_rate)
            count += residual.numel()
            for level, centroids in enumerate(self.centroids):
                residual = residual - centroids[nearest_centroid(residual, centroids)]
                error[level] += residual.double().square().sum()
        return {level + 1: float(total) / max(count, 1) for level, total in enumerate(error)}

    def _hear(self, wave: np.ndarray, rate: int) -> Tensor:
        """Mono wave [n] at `rate` Hz -> normalized frames [T, stack * mels]."""
        return _standardize(log_mel(wave, rate, self.config), self.mean, self.std)

    def _dequantize(self, codes: np.ndarray) -> Tensor:
        """Codes [T, q] -> normalized log-mel bands [T * stack, mels]."""
        levels = torch.as_tensor(codes, dtype=torch.int64).T
        frames: Any = sum(level[code] for level, code in zip(self.centroids, levels))
        return rearrange(frames, "t (s m) -> (t s) m", s=self.config.stack)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean.numpy(), "std": self.std.numpy(), "centroids": self.centroids.numpy()}


def log_mel(wave: np.ndarray, rate: int, config: MelConfig) -> Tensor:
    """Turn a mono wave [n] at `rate` Hz into frames [T, stack * mels] of log power by mel band."""
    heard = resample(wave, rate, config.sample_rate)
    samples_per_frame = config.hop * config.stack
    frames = -(-len(heard) // samples_per_frame)
    if frames == 0:
        return torch.zeros(0, config.stack * config.mels)
    if config.normalize_level:
        level = float(heard.square().mean().sqrt())
        heard = heard * (LEVEL_RMS / level) if level > SILENT_RMS else heard
    heard = torch.nn.functional.pad(heard, (0, frames * samples_per_frame - len(heard)))
    spectrum = torch.stft(
        heard,
        config.window,
        config.hop,
        window=torch.hann_window(config.window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum[:, :-1].abs().square().T  # without the window centered on the end of the wave
    bands = (power @ mel_filters(config) + POWER_FLOOR).log()
    return rearrange(bands, "(t s) m -> t (s m)", s=config.stack)


@cache
def mel_filters(config: MelConfig) -> Tensor:
    """Triangular HTK mel filters [window // 2 + 1, mels], scaled to the power of one window."""
    frequencies = torch.linspace(0, config.sample_rate // 2, config.window // 2 + 1)
    highest = 2595.0 * math.log10(1.0 + config.sample_rate / 2 / 700.0)
    corners = 700.0 * (10.0 ** (torch.linspace(0.0, highest, config.mels + 2) / 2595.0) - 1.0)
    widths, distances = corners.diff(), corners - frequencies[:, None]
    rising, falling = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
    return torch.maximum(torch.zeros(1), torch.minimum(rising, falling)) / config.window


def _standardize(frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Frames [T, stack * mels] with `mean` and `std` [mels] taken out."""
    stack = frames.shape[1] // len(mean)
    return (frames - mean.repeat(stack)) / std.repeat(stack)


def resample(wave: np.ndarray, rate: int, target: int) -> Tensor:
    """Resample a mono wave [n] from `rate` to `target` Hz, f32 [resampled_length(n, rate, target)].

    Raises `DataError` for a wave that is not one-dimensional or not finite, and for a rate that would take a filter
    of gigabytes.
    """
    check_rates(rate, target, "a wave")
    if wave.ndim != 1:
        raise DataError(f"a wave of shape {wave.shape} is not mono; mix its channels down to one before encoding")
    if not np.isfinite(wave).all():
        raise DataError("a wave holds NaN or infinite samples; repair or leave out the recording")
    length = resampled_length(len(wave), rate, target)
    resampled = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    if rate != target and len(wave):
        # torchaudio rounds the length up, and in float32, which is off by samples for minutes of audio.
        resampled = _torchaudio().resample(resampled, rate, target)[:length]
        resampled = torch.nn.functional.pad(resampled, (0, length - len(resampled)))
    return resampled


def _torchaudio() -> ModuleType:
    with needs("resampling or making audio"):
        import torchaudio.functional
    return torchaudio.functional


def code_order(frames: int, codebooks: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the (frame, codebook) [frames * codebooks] of each position of a stream of codes.

    ``flat`` writes frame by frame. ``delay`` writes by (frame + codebook, codebook): level q of a frame comes
    q frames later, after the coarse levels of the frames between (the delay pattern of Copet et al. 2023,
    written one code a position).
    """
    frame, codebook = (grid.ravel() for grid in np.indices((frames, codebooks)))
    if layout == "delay":
        order = np.lexsort((codebook, frame + codebook))
        frame, codebook = frame[order], codebook[order]
    return frame, codebook


def serialize(codes: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Put codes [T, Q] into the order of the layout: codes [T * Q], and their codebook [T * Q]."""
    frame, codebook = code_order(len(codes), codes.shape[1], layout)
    return codes[frame, codebook], codebook


def deserialize(flat: np.ndarray, frames: int, codebooks: int, layout: Layout) -> np.ndarray:
    """Undo `serialize`: codes [T * Q] become [T, Q]."""
    codes = np.empty((frames, codebooks), dtype=flat.dtype)
    codes[code_order(frames, codebooks, layout)] = flat
    return codes
