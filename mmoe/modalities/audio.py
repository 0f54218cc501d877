"""Makes a modality of audio: ids of a codec's codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe.schema.modality import ModalitySpec, Payload, Planned
from mmoe.tokenizers.rates import resampled_length

if TYPE_CHECKING:
    from mmoe.modalities.document import DocumentBuilder
    from mmoe.schema.manifest import SegmentGroup
    from mmoe.tokenizers.audio import AudioCodec
    from mmoe.tokenizers.bundle import Tokenizers


class AudioSpec(ModalitySpec):
    """Makes targets of all codes of an audio clip, and of the token that ends it."""

    name = "AUDIO"
    refused_as = "unreadable audio"

    def planned(self, segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
        """Plan the codes of all frames and codebooks."""
        codec = _codec(tokenizers)
        tokens = codec.num_frames(_samples(segments, codec), codec.sample_rate) * codec.codebooks
        plan = Planned.without_targets(tokens, 2)  # audio_start, audio_end
        return Planned(plan.tokens, plan.around, plan.tokens, plan.tokens > 0)

    def positions(self, group: SegmentGroup, tokenizers: Tokenizers, source: str) -> int:
        """Count the codes of audio clips of the group's mean length."""
        codec = _codec(tokenizers)
        frames = codec.num_frames(round(group.span / group.count), group.rate)
        return group.count * (int(frames) * codec.codebooks + 2)

    def encode(self, payload: Payload, tokenizers: Tokenizers) -> np.ndarray:
        """Turn what is heard into ids [n]; nothing is silence."""
        from mmoe.tokenizers.audio import serialize

        codec, config = _codec(tokenizers), tokenizers.config.audio
        assert config is not None  # which the codec is loaded by
        samples = int(_samples(payload.segment, codec))
        wave = np.zeros(0, np.float32) if payload.shown is None else payload.wave(codec.sample_rate)
        wave = np.resize(wave, samples)  # another's audio is cut or repeated to the length that was planned
        codes, codebook = serialize(codec.encode(wave, codec.sample_rate), config.layout)
        return tokenizers.vocabulary.audio_ids(codes, codebook)

    def layout(self, builder: DocumentBuilder, encoded: np.ndarray, payload: Payload) -> None:
        """Append the codes between their structure tokens."""
        builder.audio(encoded, int(payload.segment["offset_ns"]), payload.pair)


def _samples(segments: np.ndarray | np.void, codec: AudioCodec) -> np.ndarray:
    """How many samples segments have at the codec's rate, [n] or of one."""
    start, stop, rate = (segments[name].astype(np.int64) for name in ("start", "stop", "rate"))
    return resampled_length(stop, rate, codec.sample_rate) - resampled_length(start, rate, codec.sample_rate)


def _codec(tokenizers: Tokenizers) -> AudioCodec:
    assert tokenizers.audio is not None  # `Tokenizers` refuses audio without a codec
    return tokenizers.audio


SPEC = AudioSpec()
