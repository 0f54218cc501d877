"""Attends over sequences whose positions lie on several ranks: own queries against all keys and values.

Keys and values are gathered whole. With grouped queries they are a fraction of the hidden states, so that the gather
costs less than it saves; what a rank saves is the work of its queries and the memory of its activations.

Shape suffixes: B sequences, L positions, M = L / cp positions here, c ranks of cp, H heads, G key/value heads, K head
width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.models.attention.backend import AttentionBackend, differentiable
from mmoe.models.attention.rule import may_attend
from mmoe.parallel.collectives import all_gather_scatter_grad
from mmoe.schema.batch import PackedBatch


@dataclass(frozen=True)
class Piece:
    """Holds adjacent queries of one document, [start, stop) of the B M here, and their keys.

    The keys are [first, last) of the flattened B L. `mask` [queries, keys], None for padding, which attends to nothing.
    """

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None


@dataclass(frozen=True)
class ContextAttention:
    """Attends from the queries of this rank, by `backend`; `order` brings gathered keys into the order of the batch."""

    backend: type[AttentionBackend]
    pieces: tuple[Piece, ...]
    order: Tensor
    group: dist.ProcessGroup

    @classmethod
    def from_batch(
        cls,
        batch: PackedBatch,
        bidirectional: bool,
        backend: type[AttentionBackend],
        everywhere_cBM: Tensor,
        rank: int,
        group: dist.ProcessGroup,
    ) -> "ContextAttention":
        """Make the attention of rank `rank` of those that attend from the positions `everywhere_cBM`.

        `everywhere_cBM`: positions (of L, ascending) of each rank.
        """
        ranks, sequences, attended = everywhere_cBM.shape
        length = ranks * attended
        flat_cBM = everywhere_cBM + length * torch.arange(sequences, device=everywhere_cBM.device)[:, None]
        order = torch.empty(flat_cBM.numel(), dtype=torch.long, device=flat_cBM.device)
        order[flat_cBM.flatten()] = torch.arange(len(order), device=order.device)
        layout = tuple(x.flatten() for x in (batch.document, batch.slice, batch.modality))
        own = flat_cBM[rank].flatten().tolist()
        border = batch.cu_seqlens.tolist()
        pieces = [_piece(*span, layout, bidirectional) for span in _spans(own, border)]
        return cls(backend, tuple(pieces), order, group)

    def attend(self, q_BMHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor) -> Tensor:
        """Attend from the queries here to the keys and values of all ranks, [B, M, H, K]."""
        k, v = (all_gather_scatter_grad(x, self.group).flatten(0, 2)[self.order] for x in (k_BMGK, v_BMGK))
        q = q_BMHK.flatten(0, 1)
        parts = [self._attend(piece, q[piece.start : piece.stop], k, v) for piece in self.pieces]
        return differentiable(torch.cat(parts), q, k, v).view(q_BMHK.shape)

    def _attend(self, piece: Piece, q_nHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        if piece.mask is None:
            return v_NGK.new_zeros(len(q_nHK), q_nHK.shape[1], v_NGK.shape[2])
        k, v = (x[piece.first : piece.last] for x in (k_NGK, v_NGK))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_nHK, k, v))
        return self.backend.attend_masked(q, k, v, piece.mask)[0].transpose(0, 1)


def _spans(own: list[int], border: list[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield every run of adjacent positions within a document.

    Each is (number of its first query, position of that, position behind its last query, first position of the
    document, position behind it).
    """
    document, start = 0, 0
    for number, position in enumerate(own):
        while position >= border[document + 1]:
            document += 1
        following = own[number + 1] if number + 1 < len(own) else None
        if following != position + 1 or following >= border[document + 1]:
            yield start, own[start], position + 1, border[document], border[document + 1]
            start = number + 1


def _piece(
    start: int, query: int, stop: int, first: int, last: int, layout: tuple[Tensor, ...], bidirectional: bool
) -> Piece:
    document, slices, modality = (x[first:last] for x in layout)
    if int(document[0]) < 0:
        return Piece(start, start + stop - query, first, first, None)
    mask = may_attend(document, slices, modality, bidirectional, range(query - first, stop - first))
    return Piece(start, start + stop - query, first, last, mask)
