"""Fits an audio codec to the audio clips of a source while the source is prepared."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.optional import needs
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.tokenizers.audio import AudioConfig, MelCodec

AUDIO_CODEC = "audio_codec.safetensors"
AUDIO_REPORT = "audio_codec.json"


def fit_audio_codec(folder: Path, manifest: SourceManifest, config: AudioConfig, seed: int) -> str:
    """Fit a codec on the training audio clips of a source, save it, and return a sentence with its error.

    The error is that on the held-out audio clips, or on the training audio clips where none are held out.
    """
    rate = config.mel.sample_rate
    codec = MelCodec.fit(_waves(folder, manifest, "train", rate), config, seed)
    codec.save(folder / AUDIO_CODEC)
    measured = "heldout" if manifest.splits["heldout"].segments("AUDIO") else "train"
    errors = codec.reconstruction_error(_waves(folder, manifest, measured, rate))
    report = {"fingerprint": codec.fingerprint, "split": measured, "reconstruction_error": errors}
    (folder / AUDIO_REPORT).write_text(json.dumps(report, indent=1))
    levels = ", ".join(f"{error:.3f} with {level}" for level, error in errors.items())
    return f"audio codec: mean squared error of the normalized log-mel bands ({measured}), by levels: {levels}"


def _waves(folder: Path, manifest: SourceManifest, name: str, rate: int) -> Iterable[np.ndarray]:
    """Every AUDIO segment of a split as mono f32 [n] at `rate` Hz."""
    with needs("decoding audio"):
        from mmoe.data.load.media import load_resampled
    for shard in manifest.splits[name].shards:
        index = ShardIndex.read(folder / shard.path)
        for row in range(len(index)):
            for segment in index.row_segments(row):
                if segment["modality"] == Modality.AUDIO:
                    stored = read_stored(index, row, int(segment["member"]))
                    start, stop = int(segment["start"]), int(segment["stop"])
                    yield load_resampled(stored.content, start, stop, rate, stored.where)
