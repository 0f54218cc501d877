"""Cached embeddings: micro-batches of a step give the gradients of one forward pass over all of it."""

from dataclasses import replace

import pytest
import torch

from mmoe.losses.cached import CachedInfoNCE, Embedded, cache
from mmoe.losses.info_nce import info_nce
from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.schema.batch import PackedBatch
from tests.losses.ranks import in_ranks
from tests.losses.test_contrastive import E, pairs_of
from tests.models.random_batch import INPUTS, pack, random_sequences

MICRO_BATCHES = 4
TAU = 0.07


@pytest.fixture
def model() -> MultimodalModel:
    moe = {"n_experts": 4, "top_k": 2, "intermediate_size": 16, "layer_freq": 2, "expert_backend": "loop"}
    config = ModelConfig(d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32, contrast_dim=8, moe=moe)
    return config.build(INPUTS, seed=0).double()


def batches() -> tuple[PackedBatch, list[PackedBatch]]:
    """One global batch as a whole, and as micro-batches of 2 sequences; a caption or two stand twice in it."""
    sequences = random_sequences(seed=5, sequences=2 * MICRO_BATCHES, documents=4)
    length = 5 + max(sum(map(len, sequence)) for sequence in sequences)
    whole = pack(sequences, length)
    parts = [pack(sequences[first : first + 2], length) for first in range(0, len(sequences), 2)]
    texts = torch.arange(len(whole.pairs.group)) % (len(whole.pairs.group) - 2)
    assert [len(part.pairs.group) for part in parts].count(0) == 0 and len(texts) > 6
    shares = texts.split([len(part.pairs.group) for part in parts])
    parts = [replace(p, pairs=replace(p.pairs, text_hash=share)) for p, share in zip(parts, shares, strict=True)]
    return replace(whole, pairs=replace(whole.pairs, text_hash=texts)), parts


def embed(model: MultimodalModel, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return model.contrast(model(batch).hidden, batch.pairs, batch.modality)


def gradients(model: MultimodalModel, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Summed over `losses`, each with a backward pass of its own."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_pass(model: MultimodalModel, parts: list[PackedBatch]) -> list[Embedded]:
    with torch.no_grad():
        return [Embedded(*embed(model, batch), batch.pairs) for batch in parts]


def test_a_group_over_four_micro_batches_has_the_gradients_of_one_forward_pass(model) -> None:
    whole, parts = batches()
    expected = info_nce(*embed(model, whole), whole.pairs, TAU)
    found = [
        cached(*embed(model, batch)) for cached, batch in zip(cache(first_pass(model, parts), TAU), parts, strict=True)
    ]
    items = torch.cat([nce.items_P for nce in found])
    torch.testing.assert_close(items, expected.items_P, rtol=1e-12, atol=1e-12)
    for name in ("correct_P2", "negatives_P", "masked_P"):
        assert torch.equal(torch.cat([getattr(nce, name) for nce in found]), getattr(expected, name)), name
    assert expected.masked > 0

    wanted = gradients(model, [expected.items_P.sum()])
    got = gradients(model, [nce.items_P.sum() for nce in found])
    assert got.keys() == wanted.keys() and len(wanted) > 20
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-12 * largest, name
    apart = gradients(model, [info_nce(*embed(model, batch), batch.pairs, TAU).items_P.sum() for batch in parts])
    assert max((apart[name] - wanted[name]).abs().max() for name in wanted) > 0.01 * largest


def test_ranks_with_micro_batches_of_their_own_share_one_cache(model) -> None:
    """Two ranks of two micro-batches each: the items of their own pairs and the whole gradient of their own rows."""
    embedded = first_pass(model, batches()[1])
    ranks = in_ranks(2, lambda rank, gather: cache(embedded[2 * rank : 2 * rank + 2], TAU, gather))
    for got, wanted in zip(ranks[0] + ranks[1], cache(embedded, TAU), strict=True):
        torch.testing.assert_close(got.nce.items_P, wanted.nce.items_P, rtol=1e-12, atol=1e-12)
        assert torch.equal(got.nce.correct_P2, wanted.nce.correct_P2)
        for name in ("left_gradient_PE", "right_gradient_PE"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-11, atol=1e-12)


def test_a_micro_batch_without_pairs_is_no_obstacle() -> None:
    left, right = torch.randn(3, E), torch.randn(3, E)
    none = Embedded(left[:0], right[:0], pairs_of([], []))
    some = Embedded(left, right, pairs_of([0, 0, 1], [0, 1, 2]))
    first, second = cache([none, some], TAU)
    assert isinstance(first, CachedInfoNCE) and first(left[:0], right[:0]).items_P.shape == (0,)
    expected = info_nce(left, right, some.pairs, TAU)
    assert torch.equal(second(left, right).items_P, expected.items_P)
    assert second.nce.negatives_P.tolist() == [1, 1, 0]
