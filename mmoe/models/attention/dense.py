"""Provides the reference backend: one mask over the whole sequence.

Shape suffixes as in `mmoe.models.attention.backend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmoe.models.attention.backend import AttentionBackend
from mmoe.models.attention.rule import may_attend
from mmoe.models.attention.sdpa import SDPA_OPS, scaled_dot_product
from mmoe.schema.batch import PackedBatch


@dataclass(frozen=True)
class DenseAttention(AttentionBackend):
    """Attends by masking the whole sequence at once. Quadratic in L; for tests and small models."""

    rules = frozenset({"causal", "bidirectional_slices"})
    saved_ops = SDPA_OPS

    mask: Tensor  # [B, 1, L, L]; padding sees itself, so that its softmax is finite
    valid: Tensor  # [B, L]

    @classmethod
    def from_batch(cls, batch: PackedBatch, bidirectional: bool) -> "DenseAttention":
        """Make the mask of the batch; padding attends to itself, so that no row is empty."""
        allowed = may_attend(batch.document, batch.slice, batch.modality, bidirectional)
        itself = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
        return cls((allowed | (itself & ~batch.valid[:, None])).unsqueeze(1), batch.valid)

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Attend by one masked call over all positions, [B, L, H, K]; zeros at padding."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
        out = scaled_dot_product(q, k, v, self.mask).transpose(1, 2)
        return torch.where(self.valid[..., None, None], out, 0)

    @classmethod
    def flops(cls, documents: Sequence[int], heads: int, head_dim: int) -> int:
        """Count two products over the square of the sequence, whatever its documents are."""
        return 4 * sum(documents) ** 2 * heads * head_dim
