"""Writes the first recipe for recordings of one's own: a small model that a laptop CPU trains in minutes."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmoe.config.describe import inline
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_PAIR, Sample, Segment
from mmoe.tokenizers.audio import AudioConfig, resampled_length
from mmoe.tokenizers.vision import VisionConfig, VisionTokenizer

_LEARNED_SHARE = 0.85  # of the samples, about: the rest is held out
_PATCHES = (64, 32, 16)  # of an image: as many as let a document fit `_FITS` positions
_FITS, _SHORTEST, _LONGEST = 1024, 256, 2048  # positions of a sequence
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 4, 50, 300
_SEQUENCES = 2  # of a step
_BPE_BYTES, _IDS, _BYTES_PER_ID = 200_000, 2048, 3  # texts from so many bytes on get a tokenizer of their own


def recipe_name(name: str) -> str:
    """Give the name of a source and its run: letters, digits and underscores of a file's name without its suffix."""
    return re.sub(r"\W+", "_", Path(name).stem, flags=re.ASCII).strip("_") or "recordings"


def first_recipe(
    name: str, kind: str, input: str | None, options: dict[str, Any], items: int, samples: Sequence[Sample]
) -> str:
    """Write the recipe of a run `name` on one source, as YAML.

    `items` is how many samples the source has, and `samples` a few of them: lengths, modalities and losses follow from
    what these hold. `input` is None for a simulation.
    """
    held = {segment.modality for sample in samples for segment in sample.segments}
    pairs = any(segment.pair != NO_PAIR for sample in samples for segment in sample.segments)
    written = fmean(sum(len(s.text.encode()) for s in sample.segments) for sample in samples) * items
    bpe = Modality.TEXT in held and written >= _BPE_BYTES
    for patches in _PATCHES:
        lengths = [_length(sample, patches, _BYTES_PER_ID if bpe else 1) for sample in samples]
        if max(lengths) <= _FITS or Modality.VISION not in held:
            break
    length = min(max(64 * math.ceil(max(lengths) / 64), _SHORTEST), _FITS if held == {Modality.TEXT} else _LONGEST)
    batch, epoch = _SEQUENCES * length, fmean(lengths) * items * _LEARNED_SHARE
    steps = min(max(math.ceil(_EPOCHS * epoch / batch), _FEWEST_STEPS), _MOST_STEPS)
    tokenizers = {
        "text": f"{{path: out/{name}/text.json, vocabulary_size: {_IDS}}}  # trained on the texts first"
        if bpe
        else "{path: null}  # the 256 bytes; for more text {path: out/text.json, vocabulary_size: 4096}",
        "vision": f"{{patch: {VisionConfig().patch}, max_patches: {patches}}}  # of one image",
        "audio": f"{{path: out/{name}/shards/audio_codec.safetensors}}  # the codec that preparation fits",
        "action": "{mode: continuous, chunk: 4}  # rows of actions predicted from one instant",
    }
    chosen = [f"  {each}: {tokenizers[each]}" for each in tokenizers if Modality.named(each.upper()) in held]
    losses = {
        "ce": "{audio: 0.5}  # of a code of audio, beside 1.0 of a token of text" if Modality.AUDIO in held else None,
        "contrastive": "{weight: 0.1}" if pairs else "{weight: 0.0}  # there are no pairs",
        "action": "{weight: 1.0}" if Modality.ACTION in held else None,
    }
    return "\n".join(
        [
            f"# A first recipe for {input or kind}, made by `mmoe init`: a small model, trained in minutes on a CPU.",
            "# `mmoe config` with this file prints every other key, its meaning and its default.",
            "data:",
            "  sources:",
            f"    {name}:",
            f"      kind: {inline(kind)}",
            *([f"      input: {inline(input)}"] if input is not None else []),
            f"      shards: out/{name}/shards  # made where it is missing; delete it to make it anew",
            "      options:",
            *(f"        {inline(key)}: {inline(value)}" for key, value in options.items()),
            f"  sequence_length: {length}  # the longest of {len(samples)} samples takes {max(lengths):,}",
            "  window_documents: 512",
            f"  workers: {0 if held == {Modality.TEXT} else 1}  # processes that decode",
            "",
            "tokenizers:",
            *chosen,
            "",
            "model:",
            "  d_model: 128",
            "  n_layers: 4",
            "  n_heads: 4",
            "  n_kv_heads: 2",
            "  intermediate_size: 256",
            "  # null for a dense model. Of a CPU, groups of 32 rows ask for few kernels (docs/decisions.md).",
            "  moe: {n_experts: 8, top_k: 2, intermediate_size: 128, layer_freq: 2, token_group_alignment: 32}",
            "",
            "losses:",
            *(f"  {each}: {value}" for each, value in losses.items() if value is not None),
            "",
            "optim:",
            "  lr: {peak: 2.0e-3}",
            "  schedule: {kind: cosine, warmup: {fraction: 0.05}, minimum: 0.05}",
            "  matrices: {kind: muon, weight_decay: 0.1}",
            "",
            "training:",
            f"  run: runs/{name}",
            f"  micro_batch_sequences: {_SEQUENCES}",
            f"  global_batch_positions: {batch}  # of a step",
            f"  budget_positions: {steps * batch}  # {steps} steps, about {steps * batch / epoch:.1f} epochs",
            "",
            "checkpoint: {every_steps: 100, keep: 2}",
            "",
        ]
    )


def _length(sample: Sample, patches: int, bytes_per_id: int) -> int:
    """About how many positions a sample takes, structure tokens included."""
    vision, slices = VisionTokenizer(VisionConfig(max_patches=patches)), {s.slice for s in sample.segments} - {-1}
    return sum(_positions(s, vision, bytes_per_id) for s in sample.segments) + 3 * len(slices) + 4


def _positions(segment: Segment, vision: VisionTokenizer, bytes_per_id: int) -> int:
    match segment.modality:
        case Modality.TEXT:
            return math.ceil(len(segment.text.encode()) / bytes_per_id)
        case Modality.VISION:
            return (segment.stop - segment.start) * int(vision.num_tokens(segment.height, segment.width)) + 2
        case Modality.AUDIO:
            audio = AudioConfig()
            heard = resampled_length(segment.stop - segment.start, segment.rate, audio.mel.sample_rate)
            return math.ceil(heard / (audio.mel.hop * audio.mel.stack)) * audio.codebooks + 2
    return 1
