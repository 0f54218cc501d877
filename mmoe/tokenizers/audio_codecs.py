"""Pretrained neural codecs of transformers, read from a local folder, and the choice of a run's codec.

The adapters have the interface of `mmoe.tokenizers.audio.AudioCodec`. Nothing is ever downloaded.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe.errors import ConfigError, DataError
from mmoe.files import Read, read_file
from mmoe.optional import require
from mmoe.tokenizers.audio import AudioCodec, AudioConfig, MelCodec, resample
from mmoe.tokenizers.rates import Count, resampled_length


def load_codec(config: AudioConfig, read: Read = read_file) -> AudioCodec:
    """Load the codec that a config names; `read` reads the file of a fitted one, which may be far away.

    Raises ConfigError without a path, DataError for a file or folder that is missing or holds something else,
    PackageError where a pretrained codec is asked for and transformers is not installed.
    """
    if config.path is None:
        raise ConfigError(
            "tokenizers.audio.path is not set; name the fitted codec that preparation wrote, or with "
            "tokenizers.audio.kind encodec, dac or mimi the local folder of the pretrained model"
        )
    if config.kind != "mel":
        return _ADAPTERS[config.kind](config.path, config.codebooks)
    codec = MelCodec.load(config.path, config.codebooks, read)
    fitted, asked = codec.config.model_dump(), config.mel.model_dump()
    different = [key for key in asked if fitted[key] != asked[key]]
    if different:
        raise DataError(
            f"{config.path} was fitted with "
            + ", ".join(f"{key} {fitted[key]} (tokenizers.audio.mel.{key} is {asked[key]})" for key in different)
            + "; write the fitted values in the config or fit the codec again"
        )
    return codec


class PretrainedCodec:
    """Runs a codec of transformers: frames of `hop` samples at `sample_rate` Hz, its first `codebooks` levels."""

    kind: str  # `model_type` in the folder's config.json
    architecture: str  # the class in transformers

    def __init__(self, path: str, codebooks: int) -> None:
        self.model = _load(path, self.kind, self.architecture)
        config = self.model.config
        if getattr(config, "audio_channels", 1) != 1 or getattr(config, "normalize", False):
            raise DataError(
                f"{path} is a codec for stereo or level-normalized audio, which codes alone do not restore; "
                "name a mono one in tokenizers.audio.path (of EnCodec, the 24 kHz model)"
            )
        if codebooks > self._levels:
            raise ConfigError(
                f"{path} has {self._levels} levels and tokenizers.audio.codebooks asks for {codebooks}; "
                f"set tokenizers.audio.codebooks <= {self._levels}"
            )
        self.codebooks = codebooks
        self.codebook_size = config.codebook_size
        self.sample_rate = config.sampling_rate

    def num_frames(self, samples: Count, rate: Count | int) -> Count:
        """Count the code frames of a wave of `samples` samples at `rate` Hz: the last, partial frame counts."""
        return -(-resampled_length(samples, rate, self.sample_rate) // self.hop)

    @torch.inference_mode()
    def encode(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """Encode mono f32 `wave` [n] in [-1, 1] at `rate` Hz as i64 codes [T, Q], T = num_frames(n, rate)."""
        heard = resample(wave, rate, self.sample_rate)
        if len(heard) == 0:
            return np.zeros((0, self.codebooks), dtype=np.int64)
        # Whole frames in, whole frames out: each model rounds a partial frame in its own way.
        heard = torch.nn.functional.pad(heard, (0, -len(heard) % self.hop))
        return self._encode(heard[None, None])[0, : self.codebooks].T.contiguous().numpy()

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes [T, q] of the first q <= Q levels to an f32 wave [T * hop]."""
        if len(codes) == 0:
            return np.zeros(0, dtype=np.float32)
        wave = self._decode(torch.as_tensor(codes, dtype=torch.int64).T[None]).flatten()
        return torch.nn.functional.pad(wave, (0, len(codes) * self.hop - len(wave))).numpy()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the levels in use and the weights: equal codecs give equal codes."""
        digest = hashlib.sha256(f"{self.kind} {self.codebooks}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def hop(self) -> int:
        """Samples of one code frame."""
        return self.model.config.hop_length

    @property
    def _levels(self) -> int:
        return self.model.config.num_quantizers

    def _encode(self, wave: Tensor) -> Tensor:
        """Wave [1, 1, T * hop] -> codes [1, at least Q, T]."""
        raise NotImplementedError

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes [1, q, T] -> wave of about T * hop samples, in any shape."""
        raise NotImplementedError


class EncodecCodec(PretrainedCodec):
    """Turns audio into the codes of a pretrained EnCodec, and back."""

    kind, architecture = "encodec", "EncodecModel"

    def _encode(self, wave: Tensor) -> Tensor:
        return self.model.encode(wave, bandwidth=self.model.config.target_bandwidths[-1]).audio_codes[0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


class DacCodec(PretrainedCodec):
    """Turns audio into the codes of a pretrained Descript audio codec, and back."""

    kind, architecture = "dac", "DacModel"

    @property
    def _levels(self) -> int:
        return self.model.config.n_codebooks

    def _encode(self, wave: Tensor) -> Tensor:
        return self.model.encode(wave, n_quantizers=self.codebooks).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


class MimiCodec(PretrainedCodec):
    """Turns audio into the codes of a pretrained Mimi, and back."""

    kind, architecture = "mimi", "MimiModel"

    @property
    def hop(self) -> int:
        """Samples of one code frame."""
        return round(self.model.config.sampling_rate / self.model.config.frame_rate)

    def _encode(self, wave: Tensor) -> Tensor:
        return self.model.encode(wave).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


_ADAPTERS = {codec.kind: codec for codec in (EncodecCodec, DacCodec, MimiCodec)}


def _load(path: str, kind: str, architecture: str) -> Any:
    """The f32 model (a module of transformers) of a local folder, in evaluation mode."""
    transformers = require("transformers", "tokenizers.audio.kind")
    settings = Path(path) / "config.json"
    if not settings.is_file():
        raise DataError(
            f"{settings} does not exist: tokenizers.audio.path must name the local folder of a {kind} model "
            "as save_pretrained writes it; nothing is downloaded"
        )
    try:
        found = json.loads(settings.read_bytes()).get("model_type")
    except ValueError as error:
        raise DataError(f"{settings} is not JSON ({error}); copy the model's folder again") from error
    if found != kind:
        raise DataError(f"{settings} describes a {found} model, not {kind}; set tokenizers.audio.kind to what it is")
    try:
        model, report = getattr(transformers, architecture).from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers reports a bad folder by many types
        raise DataError(f"{path} cannot be loaded as a {kind} model ({error}); copy the folder again") from error
    if report["missing_keys"]:
        raise DataError(
            f"{path} lacks {len(report['missing_keys'])} tensors of a {kind} model, such as "
            f"{sorted(report['missing_keys'])[0]}; copy the model's folder again"
        )
    return model.eval()
