"""Provides the backend of packed batches, which attends document by document.

Shape suffixes as in `mmoe.models.attention.backend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.models.attention.backend import AttentionBackend, differentiable
from mmoe.models.attention.rule import may_attend
from mmoe.models.attention.sdpa import SDPA_OPS, scaled_dot_product
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality


@dataclass(frozen=True)
class DocumentGroup:
    """Holds `count` adjacent documents of `length` positions, which share one attention call.

    `mask`: [count, 1, length, length], None where causal. A group of padding attends to nothing.
    """

    count: int
    length: int
    mask: Tensor | None
    padding: bool


@dataclass(frozen=True)
class DocumentAttention(AttentionBackend):
    """Attends document by document over `cu_seqlens`; adjacent documents of equal length share a call.

    A document is a view of the batch, so nothing is gathered. Only one that holds images gets a mask, of its
    own size, and only where slices are bidirectional. Padding is not computed.
    """

    rules = frozenset({"causal", "bidirectional_slices"})
    supports_cp = True
    saved_ops = SDPA_OPS

    groups: tuple[DocumentGroup, ...]

    @classmethod
    def from_batch(cls, batch: PackedBatch, bidirectional: bool) -> "DocumentAttention":
        """Find the groups of equally long documents in the batch, and the masks of those with images."""
        document, slices, modality = (x.flatten() for x in (batch.document, batch.slice, batch.modality))
        whole_slice = bidirectional & (modality == Modality.VISION) & (slices >= 0)
        border = batch.cu_seqlens.long()
        padding = document[border[:-1]] < 0
        masked = F.pad(whole_slice.cumsum(0), (1, 0))[border].diff() > 0
        pieces = zip(border[:-1].tolist(), border[1:].tolist(), padding.tolist(), masked.tolist())
        groups = []
        for (length, is_padding, is_masked), same in groupby(pieces, key=lambda p: (p[1] - p[0], p[2], p[3])):
            ranges = [(start, stop) for start, stop, _, _ in same]
            mask = None
            if is_masked:
                alike = [torch.stack([x[a:b] for a, b in ranges]) for x in (document, slices, modality)]
                mask = may_attend(alike[0], alike[1], alike[2], bidirectional).unsqueeze(1)
            groups.append(DocumentGroup(len(ranges), length, mask, is_padding))
        return cls(tuple(groups))

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Attend by one call for each group of equally long documents, [B, L, H, K]; zeros at padding."""
        # One transpose and one split for all documents: autograd then joins their gradients in a single copy.
        sizes = [group.count * group.length for group in self.groups]
        q, k, v = (x.flatten(0, 1).transpose(0, 1).split(sizes, dim=1) for x in (q_BLHK, k_BLGK, v_BLGK))
        parts = [_attend_group(group, *qkv) for group, *qkv in zip(self.groups, q, k, v)]
        return differentiable(torch.cat(parts), q_BLHK, k_BLGK, v_BLGK).view(q_BLHK.shape)

    @classmethod
    def flops(cls, documents: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the operations of two products over half the square of each document, the causal half."""
        return 2 * sum(length**2 for length in documents) * heads * head_dim

    @classmethod
    def attend_masked(cls, q_bHnK: Tensor, k_bGmK: Tensor, v_bGmK: Tensor, mask_nm: Tensor) -> Tensor:
        """Attend from some queries of a document to all its keys by one masked call, [b, H, n, K]."""
        return scaled_dot_product(q_bHnK, k_bGmK, v_bGmK, mask_nm)


def _attend_group(group: DocumentGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [H, positions, K], k and v [G, positions, K] of one group -> [positions, H, K]."""
    if group.padding:
        return v.new_zeros(q.shape[1], q.shape[0], v.shape[2])
    q, k, v = (x.unflatten(1, (group.count, group.length)).transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product(q, k, v, group.mask).transpose(1, 2).flatten(0, 1)
