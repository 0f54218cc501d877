"""Grouped-query attention, and the backends that apply the attention rule to a packed batch.

What a backend needs of a batch (document borders, masks) is worked out once a forward pass, in its *plan*, and
shared by all layers. Shape suffixes: B sequences, L positions, N = B L, H heads, G key/value heads, K head width.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.attention_rule import may_attend
from mmoe.models.layers import RMSNorm
from mmoe.models.rotary import RotaryTables
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality


class AttentionPlan(Protocol):
    """Attends under the attention rule of one batch, which all layers share."""

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """[B, L, H, K], in the dtype of v; zeros at padding."""


class WholePlan(AttentionPlan, Protocol):
    """Attends over a batch whose positions are all on this process."""

    @classmethod
    def of(cls, batch: PackedBatch, bidirectional: bool) -> AttentionPlan:
        """Work out what every layer will need of this batch, all of which is here."""


@dataclass(frozen=True)
class DensePlan:
    """The reference: one mask over the whole sequence. Quadratic in L; for tests and small models."""

    mask: Tensor  # [B, 1, L, L]; padding sees itself, so that its softmax is finite
    valid: Tensor  # [B, L]

    @classmethod
    def of(cls, batch: PackedBatch, bidirectional: bool) -> "DensePlan":
        """Make the mask of the batch; padding attends to itself, so that no row is empty."""
        allowed = may_attend(batch.document, batch.slice, batch.modality, bidirectional)
        itself = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
        return cls((allowed | (itself & ~batch.valid[:, None])).unsqueeze(1), batch.valid)

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Give [B, L, H, K] by one masked call over all positions; zeros at padding."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
        out = scaled_dot_product(q, k, v, self.mask).transpose(1, 2)
        return torch.where(self.valid[..., None, None], out, 0)


@dataclass(frozen=True)
class Run:
    """`count` adjacent documents of `length` positions; `mask` [count, 1, length, length], None where causal.

    A run of padding attends to nothing.
    """

    count: int
    length: int
    mask: Tensor | None
    padding: bool


@dataclass(frozen=True)
class DocumentPlan:
    """Attention document by document over `cu_seqlens`; adjacent documents of equal length share a call.

    A document is a view of the batch, so nothing is gathered. Only one that holds pictures gets a mask, of its
    own size, and only where slices are bidirectional. Padding is not computed.
    """

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, batch: PackedBatch, bidirectional: bool) -> "DocumentPlan":
        """Find the runs of equally long documents in the batch, and the masks of those with pictures."""
        document, slices, modality = (x.flatten() for x in (batch.document, batch.slice, batch.modality))
        whole_slice = bidirectional & (modality == Modality.VISION) & (slices >= 0)
        border = batch.cu_seqlens.long()
        padding = document[border[:-1]] < 0
        masked = F.pad(whole_slice.cumsum(0), (1, 0))[border].diff() > 0
        pieces = zip(border[:-1].tolist(), border[1:].tolist(), padding.tolist(), masked.tolist())
        runs = []
        for (length, is_padding, is_masked), same in groupby(pieces, key=lambda p: (p[1] - p[0], p[2], p[3])):
            ranges = [(start, stop) for start, stop, _, _ in same]
            mask = None
            if is_masked:
                alike = [torch.stack([x[a:b] for a, b in ranges]) for x in (document, slices, modality)]
                mask = may_attend(alike[0], alike[1], alike[2], bidirectional).unsqueeze(1)
            runs.append(Run(len(ranges), length, mask, is_padding))
        return cls(tuple(runs))

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Give [B, L, H, K] by one call for each run of equally long documents; zeros at padding."""
        # One transpose and one split for all documents: autograd then joins their gradients in a single copy.
        sizes = [run.count * run.length for run in self.runs]
        q, k, v = (x.flatten(0, 1).transpose(0, 1).split(sizes, dim=1) for x in (q_BLHK, k_BLGK, v_BLGK))
        parts = [_attend_run(run, *qkv) for run, *qkv in zip(self.runs, q, k, v)]
        return differentiable(torch.cat(parts), q_BLHK, k_BLGK, v_BLGK).view(q_BLHK.shape)


def differentiable(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`out`, with zeros as gradients of q, k and v where it was made of padding alone and would have none.

    Ranks that add up their gradients must all have the same ones.
    """
    if out.requires_grad or not q.requires_grad:
        return out
    return out + 0 * (q.sum() + k.sum() + v.sum())


def _attend_run(run: Run, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [H, positions, K], k and v [G, positions, K] of one run -> [positions, H, K]."""
    if run.padding:
        return v.new_zeros(q.shape[1], q.shape[0], v.shape[2])
    q, k, v = (x.unflatten(1, (run.count, run.length)).transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product(q, k, v, run.mask).transpose(1, 2).flatten(0, 1)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [b, H, n, K], k and v [b, G, n, K] -> [b, H, n, K] in the dtype of v; causal without a mask.

    On a CPU float32 is faster than bfloat16 for documents below a thousand positions, so it computes widened.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else v.dtype
        q, k, values = (x.to(dtype) for x in (q, k, v))
        causal, grouped = mask is None, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.to(v.dtype)


BACKENDS: dict[str, type[WholePlan]] = {"sdpa_documents": DocumentPlan, "dense": DensePlan}


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), with RMS-normalised queries and keys where `qk_norm`.

    Query head h reads key/value head ``h // (heads / kv_heads)``.
    """

    def __init__(self, size: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(size, heads * head_dim, bias=False)
        self.key = nn.Linear(size, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(size, kv_heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, size, bias=False)
        self.query_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rotary: RotaryTables, plan: AttentionPlan) -> Tensor:
        """[B, L, D] -> [B, L, D]; zeros at padding."""
        q, k, v = (project(x_BLD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = rotary.rotate(self.query_norm(q)), rotary.rotate(self.key_norm(k))
        return self.output(plan.attend(q, k, v).flatten(2))
