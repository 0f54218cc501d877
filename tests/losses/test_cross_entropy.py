"""The chunked CE against torch's own, and what of the logits exists at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.losses.cross_entropy import cross_entropy
from mmoe.schema.batch import IGNORE

B, L, D, V = 3, 17, 8, 29


def case(seed: int, labeled: float = 0.6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, L, D, generator=generator, dtype=dtype)
    head = torch.randn(V, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) > labeled] = IGNORE
    weight = torch.rand(B, L, generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), labels, weight


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, B * L + 3), labeled=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_equals_torch_in_value_and_gradient(seed: int, chunk: int, labeled: float) -> None:
    hidden, head, labels, weight = case(seed, labeled)
    ce = cross_entropy(lambda h: h @ head.T, hidden, labels, weight, chunk)
    gradients = torch.autograd.grad(ce.total, (hidden, head), allow_unused=True, materialize_grads=True)

    logits = (hidden @ head.T).flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    expected = (each * weight.flatten()).sum()
    torch.testing.assert_close(ce.total, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for got, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-11, atol=1e-12)

    where = (labels.flatten() != IGNORE).nonzero().squeeze(1)
    assert torch.equal(ce.index_N, where)
    torch.testing.assert_close(ce.items_N, each.detach()[where], rtol=1e-12, atol=1e-12)
    assert not ce.items_N.requires_grad


def test_only_labeled_positions_reach_the_head_and_never_more_than_a_chunk() -> None:
    hidden, head, labels, weight = case(1)
    n, seen, saved = int((labels != IGNORE).sum()), [], []

    def watched(h: torch.Tensor) -> torch.Tensor:
        seen.append(len(h))
        return h @ head.T

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = cross_entropy(watched, hidden, labels, weight, chunk=4).total
    assert sum(seen) == n and max(seen) == 4
    # What waits for backward is the hidden states and the weights of the head, not a chunk's logits.
    assert max(saved) <= max(n * D, V * D) and sum(size == 4 * V for size in saved) == 0
    seen.clear()
    total.backward()
    assert sum(seen) == n and max(seen) == 4


def test_half_precision_logits_are_reduced_in_float32() -> None:
    hidden, head, labels, weight = case(2, dtype=torch.bfloat16)
    ce = cross_entropy(lambda h: h @ head.T, hidden, labels, weight, chunk=8)
    logits = (hidden @ head.T).flatten(0, 1).float()
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
    assert ce.total.dtype == ce.items_N.dtype == torch.float32
    torch.testing.assert_close(ce.items_N, expected[ce.index_N].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_without_labels_is_a_zero_with_a_gradient(dtype: torch.dtype) -> None:
    hidden, head, labels, weight = case(3, dtype=dtype)
    hidden = torch.full_like(hidden, torch.nan).requires_grad_()  # not even NaN is read
    ce = cross_entropy(lambda h: h @ head.T, hidden, torch.full_like(labels, IGNORE), weight, chunk=8)
    ce.total.backward()
    assert ce.total == 0 and ce.total.dtype == dtype and torch.equal(hidden.grad, torch.zeros_like(hidden))
