"""Defines what the blocks need to know of a batch beside its hidden states, worked out once a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmoe.models.attention.backend import BatchAttention
from mmoe.models.moe.tokens import Tokens
from mmoe.models.rotary import RotaryTables
from mmoe.schema.batch import PackedBatch

if TYPE_CHECKING:
    from mmoe.models.decoder import ModelConfig


@dataclass(frozen=True)
class BatchContext:
    """Holds what the blocks need to know of a batch: rotary positions, attention and tokens.

    `rotary` and `attention` are of the positions that attention sees, `tokens` of those the experts see. In one
    process these are all positions of the batch. Where a sequence lies on several ranks, they hold what this rank
    has of it (`mmoe.parallel.sequence`).
    """

    rotary: RotaryTables
    attention: BatchAttention
    tokens: Tokens

    @classmethod
    def from_batch(cls, batch: PackedBatch, config: ModelConfig, dtype: torch.dtype) -> BatchContext:
        """Make the context of a batch that is whole; `dtype` is that of its embedding."""
        return cls(
            RotaryTables.from_positions(batch.position, config.head_width, config.rope_theta, dtype),
            config.attention_class.from_batch(batch, config.bidirectional_slices),
            Tokens.from_batch(batch),
        )
