"""Exports a run's text path as a folder of Hugging Face."""

import json
import logging
from pathlib import Path

import torch

from mmoe.interchange.huggingface import SHARD_BYTES, VOCABULARY_KEY, Exported, save
from mmoe.interchange.tokenizer import save_tokenizer
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run

logger = logging.getLogger(__name__)

TOKEN_IDS = {
    "bos_token_id": int(Structure.BOS),
    "eos_token_id": int(Structure.EOS),
    "pad_token_id": int(Structure.PAD),
}


def export(run: Run, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Write weights, config and tokenizer of `run` into `folder`, and say what was left out.

    The whole table of ids is written, so ids mean there what they mean here.
    """
    text = run.tokenizers.vocabulary.ranges["text"]
    done = save(
        run.model,
        folder,
        positions=run.config.data.sequence_length,
        dtype=dtype,
        shard_bytes=shard_bytes,
        extra={**TOKEN_IDS, VOCABULARY_KEY: [text.start, text.stop]},
    )
    (folder / "generation_config.json").write_text(json.dumps(TOKEN_IDS, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(run.tokenizers.text, run.tokenizers.vocabulary, folder)
    ids = f"text ids {text.start} to {text.stop - 1}"
    logger.info(f"{folder}: {done.architecture}, {done.parameters:,} parameters, {ids}")
    parts = ", ".join(f"{name} {count:,}" for name, count in done.left_out.items())
    total = sum(done.left_out.values())
    logger.info(f"left out, as text does not go through it: {total:,} parameters ({parts})")
    return done
