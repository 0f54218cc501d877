from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.models.attention.dense import DenseAttention
from mmoe.models.attention.documents import DocumentAttention
from mmoe.models.attention.module import Attention
from mmoe.models.attention.rule import may_attend
from mmoe.models.rotary import RotaryTables
from mmoe.schema.modality import Modality
from tests.models.random_batch import pack, random_batch, random_sequences

RULES = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])


@RULES
def test_rule_says_what_the_design_says(bidirectional):
    batch = random_batch(3)
    allowed = may_attend(batch.document, batch.slice, batch.modality, bidirectional)
    B, L = batch.shape
    for b in range(B):
        document, slices = batch.document[b].tolist(), batch.slice[b].tolist()
        vision = (batch.modality[b] == Modality.VISION).tolist()
        for i, j in product(range(L), repeat=2):
            expected = document[i] == document[j] >= 0 and (
                j <= i or (bidirectional and vision[i] and vision[j] and slices[i] == slices[j] >= 0)
            )
            assert allowed[b, i, j] == expected


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), bidirectional=st.booleans(), qk_norm=st.booleans(), kv_heads=st.sampled_from([1, 2, 4])
)
def test_documents_equal_the_dense_reference_in_values_and_gradients(seed, bidirectional, qk_norm, kv_heads):
    batch = random_batch(seed, sequences=2, documents=3)
    torch.manual_seed(seed)
    attention = Attention(32, 4, kv_heads, 8, qk_norm, 1e-6).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rotary = RotaryTables.from_positions(batch.position, 8, 10_000.0, torch.float64)
    x = torch.randn(*batch.shape, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*batch.shape, 32, dtype=torch.float64)
    results = []
    for backend in (DocumentAttention, DenseAttention):
        out = attention(x, rotary, backend.from_batch(batch, bidirectional))
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *attention.parameters()])])
        assert (out[~batch.valid] == 0).all()
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_plan_masks_only_documents_with_images_and_never_a_sequence():
    batch = random_batch(5, documents=6)
    lengths = batch.cu_seqlens.diff().tolist()
    assert all(group.mask is None for group in DocumentAttention.from_batch(batch, False).groups)
    groups = DocumentAttention.from_batch(batch, True).groups
    assert sum(group.count * group.length for group in groups) == batch.document.numel() == sum(lengths)
    masked = [group for group in groups if group.mask is not None]
    assert masked and all(group.mask.shape == (group.count, 1, group.length, group.length) for group in masked)
    vision = sum(
        bool(((batch.modality == Modality.VISION) & (batch.slice >= 0)).flatten()[a:b].any())
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
    )
    assert sum(group.count for group in masked) == vision


def test_adjacent_documents_of_equal_length_share_a_call():
    [document] = random_sequences(0, 1, 1)[0][:1]
    batch = pack([[document] * 5])
    groups = DocumentAttention.from_batch(batch, True).groups
    assert [(group.count, group.padding) for group in groups] == [(5, False), (1, True)]


def test_a_nan_in_the_padding_stays_there():
    batch = random_batch(1)
    x = torch.randn(*batch.shape, 4, 8)
    clean = DocumentAttention.from_batch(batch, False).attend(x, x, x)
    x = torch.where(batch.valid[..., None, None], x, torch.nan)
    torch.testing.assert_close(DocumentAttention.from_batch(batch, False).attend(x, x, x), clean, rtol=0, atol=0)


def test_a_full_batch_needs_no_padding():
    sequences = random_sequences(2, 1, 3)
    batch = pack(sequences, length=sum(map(len, sequences[0])))
    assert batch.valid.all() and not any(group.padding for group in DocumentAttention.from_batch(batch, True).groups)
