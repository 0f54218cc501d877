"""The queries of all ranks together attend exactly as the reference does with the whole batch."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.models.attention.dense import DenseAttention
from mmoe.models.attention.documents import DocumentAttention
from mmoe.models.attention.rule import may_attend
from mmoe.parallel import context
from mmoe.parallel.context import ContextAttention
from mmoe.parallel.sequence import PIECES, Positions
from mmoe.schema.batch import PackedBatch
from tests.models.random_batch import pack, random_batch, random_sequences


def batch_of(seed: int, cp: int) -> PackedBatch:
    sequences = random_sequences(seed, 2, 3)
    longest = max(sum(map(len, sequence)) for sequence in sequences) + 1
    unit = cp * PIECES
    return pack(sequences, -(-longest // unit) * unit)


def positions(batch: PackedBatch, cp: int) -> torch.Tensor:
    return Positions.for_rank(batch.document, cp, 1, rank=0).attended_cBM


def attend(batch: PackedBatch, cp: int, bidirectional: bool, qkv: list[torch.Tensor]) -> torch.Tensor:
    """What all ranks give, put together: a rank's `gather` is handed the parts of all."""
    everywhere = positions(batch, cp)
    parts = [torch.stack([x.take_along_dim(own[..., None, None], 1) for own in everywhere]) for x in qkv]
    out = torch.zeros_like(qkv[0])
    for rank in range(cp):
        plan = ContextAttention.from_batch(batch, bidirectional, DocumentAttention, everywhere, rank, None)
        gathered = iter(parts[1:])
        with patch.object(context, "all_gather_scatter_grad", lambda x, group, gathered=gathered: next(gathered)):
            own = plan.attend(*(part[rank] for part in parts))
        out.scatter_(1, everywhere[rank][..., None, None].expand_as(own), own)
    return out


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_the_ranks_together_are_the_dense_reference(seed: int, cp: int, bidirectional: bool) -> None:
    batch = batch_of(seed, cp)
    generator = torch.Generator().manual_seed(seed)
    qkv = [
        torch.randn(*batch.shape, heads, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    weight = torch.randn(qkv[0].shape, generator=generator, dtype=torch.float64)
    results = []
    for out in (attend(batch, cp, bidirectional, qkv), DenseAttention.from_batch(batch, bidirectional).attend(*qkv)):
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_the_pieces_say_what_the_rule_says(seed: int, cp: int, bidirectional: bool) -> None:
    """Every query is in one piece, and its piece allows exactly the keys that the rule allows."""
    batch = batch_of(seed, cp)
    everywhere, length = positions(batch, cp), batch.shape[1]
    rule = may_attend(batch.document, batch.slice, batch.modality, bidirectional)
    for rank in range(cp):
        plan = ContextAttention.from_batch(batch, bidirectional, DocumentAttention, everywhere, rank, None)
        allowed = torch.zeros(everywhere[rank].numel(), 2 * length, dtype=torch.bool)
        assert [piece.start for piece in plan.pieces[1:]] == [piece.stop for piece in plan.pieces[:-1]]
        assert plan.pieces[0].start == 0 and plan.pieces[-1].stop == len(allowed)
        for piece in plan.pieces:
            if piece.mask is not None:
                allowed[piece.start : piece.stop, piece.first : piece.last] = piece.mask
        for sequence, own in enumerate(everywhere[rank]):
            rows = allowed[sequence * len(own) : (sequence + 1) * len(own)]
            expected = torch.zeros_like(rows)
            expected[:, sequence * length : (sequence + 1) * length] = rule[sequence, own]
            assert torch.equal(rows, expected)


@pytest.mark.parametrize("cp", [2, 4])
def test_vectors_go_to_the_rank_of_their_position_and_nowhere_else(cp: int) -> None:
    batch = random_batch(1)
    unit = cp * PIECES
    batch = pack(random_sequences(1, 2, 4), -(-batch.shape[1] // unit) * unit)
    for kind, values in batch.values.items():
        found = []
        for rank in range(cp):
            dealt = Positions.for_rank(batch.document, cp, 1, rank)
            here = dealt.local(batch)
            index = here.values[kind].index
            assert (here.modality.flatten()[index[index >= 0]] == kind).all()
            flat = (dealt.here_BH + batch.shape[1] * torch.arange(2)[:, None]).flatten()
            found.append(torch.where(index >= 0, flat[index.clamp(min=0)], -1))
        stacked = torch.stack(found)
        assert ((stacked >= 0).sum(0) == (values.index >= 0)).all()
        assert torch.equal(stacked.max(0).values, values.index)
