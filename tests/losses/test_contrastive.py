"""InfoNCE against a loop over pairs written from the formula."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.losses.info_nce import info_nce
from mmoe.schema.batch import Pairs
from tests.losses.ranks import in_ranks

E = 6


def pairs_of(group: list[int], text: list[int]) -> Pairs:
    n = len(group)
    return Pairs(
        torch.zeros(n, 2, 2, dtype=torch.int64),
        torch.zeros(n, 2, dtype=torch.uint8),
        torch.tensor(text),
        torch.tensor(group),
    )


def naive(left: torch.Tensor, right: torch.Tensor, pairs: Pairs, tau: float) -> list[torch.Tensor]:
    """Loss of each pair: -log of its own share among itself and its negatives, averaged over both directions."""
    group, text = pairs.group.tolist(), pairs.text_hash.tolist()
    losses = []
    for i in range(len(group)):
        rivals = [j for j in range(len(group)) if group[j] == group[i] and text[j] != text[i]]

        def score(a: int, b: int) -> torch.Tensor:
            x, y = left[a], right[b]
            return (x @ y) / (x.norm() * y.norm()) / tau

        forward = torch.stack([score(i, j) for j in [i, *rivals]])
        backward = torch.stack([score(j, i) for j in [i, *rivals]])
        losses.append(-(forward[0] - forward.logsumexp(0) + backward[0] - backward.logsumexp(0)) / 2)
    return losses


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    members=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=9),
)
def test_equals_the_naive_loop_in_value_and_gradient(seed: int, members: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = len(members)
    left = torch.randn(n, E, generator=generator, dtype=torch.float64, requires_grad=True)
    right = torch.randn(n, E, generator=generator, dtype=torch.float64, requires_grad=True)
    pairs = pairs_of([m[0] for m in members], [m[1] for m in members])
    nce = info_nce(left, right, pairs, 0.07)
    expected = torch.stack(naive(left, right, pairs, 0.07))
    torch.testing.assert_close(nce.items_P, expected, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(nce.items_P.sum(), (left, right), retain_graph=True)
    wanted = torch.autograd.grad(expected.sum(), (left, right))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    same = [(a, b) for a in range(n) for b in range(n) if a != b and members[a] == members[b]]
    assert int(nce.masked) == len(same)
    rivals = [sum(g == members[i][0] and t != members[i][1] for g, t in members) for i in range(n)]
    assert nce.negatives_P.tolist() == rivals


def test_a_pair_without_a_negative_is_exactly_nothing() -> None:
    """Alone in its group, or among its own caption only: zero loss, zero gradient."""
    # float64: no cosine over 0.07 is so far above another that the loss of its pair is rounded to nothing.
    left, right = (torch.randn(5, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    nce = info_nce(left, right, pairs_of([0, 1, 1, 2, 2], [7, 3, 3, 1, 2]), 0.07)
    assert nce.negatives_P.tolist() == [0, 0, 0, 1, 1]
    assert nce.items_P[:3].tolist() == [0.0, 0.0, 0.0] and (nce.items_P[3:] > 0).all()
    nce.items_P.sum().backward()
    for side in (left, right):
        assert (
            torch.equal(side.grad[:3], torch.zeros(3, E, dtype=torch.float64))
            and (side.grad[3:].abs().sum(1) > 0).all()
        )


def test_groups_never_see_each_other() -> None:
    left, right = torch.randn(6, E, requires_grad=True), torch.randn(6, E, requires_grad=True)
    nce = info_nce(left, right, pairs_of([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]), 0.07)
    gradients = torch.autograd.grad(nce.items_P[:3].sum(), (left, right))
    assert all(torch.equal(g[3:], torch.zeros(3, E)) for g in gradients)


def test_chance_and_certainty() -> None:
    """Identical embeddings: log of the number of candidates, nothing correct. Orthogonal ones: all correct."""
    n, one = 8, torch.ones(8, E)
    nce = info_nce(one, one, pairs_of([0] * n, list(range(n))), 0.07)
    assert nce.items_P.tolist() == pytest.approx([math.log(n)] * n, rel=1e-5)
    assert not nce.correct_P2.any()
    apart = info_nce(torch.eye(E), torch.eye(E), pairs_of([0] * E, list(range(E))), 0.07)
    assert apart.correct_P2.all() and (apart.items_P < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_that_is_the_same_is_not_beaten_whichever_way_the_last_bit_falls(dtype) -> None:
    """The same image under two captions: how a layout sums decides which of the two scores is higher by a rounding."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 64, generator=generator, dtype=dtype)
    pairs = pairs_of([0] * 3, [0, 1, 2])
    left, right = left + 9 * right, right  # partners are alike
    assert info_nce(left, right, pairs, 0.07).correct_P2.all()
    for first, second in ((0, 1), (1, 0)):
        same = right.clone()
        same[second] = same[first]
        same[first] += 16 * torch.finfo(dtype).eps * left[first]
        assert not info_nce(left, same, pairs, 0.07).correct_P2[first, 0]


def test_scores_are_not_computed_in_half_precision() -> None:
    left, right = torch.randn(4, E), torch.randn(4, E)
    pairs = pairs_of([0] * 4, list(range(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(left, right, pairs, 0.07).items_P
    assert torch.equal(inside, info_nce(left, right, pairs, 0.07).items_P)


# groups that lie on several ranks


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    members=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=0, max_size=9),
    cut=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_gathered_groups_give_the_items_and_gradients_of_one_process(seed, members, cut) -> None:
    """Ranks with any number of pairs, none included: each has the items of its own pairs, and their whole gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = len(members)
    left, right = (torch.randn(n, E, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pairs = pairs_of([m[0] for m in members], [m[1] for m in members])
    borders = [0, *sorted(min(at, n) for at in cut), n]
    rows = [slice(a, b) for a, b in itertools.pairwise(borders)]

    def work(rank: int, gather):
        own = rows[rank]
        sides = [side[own].detach().requires_grad_() for side in (left, right)]
        mine = Pairs(*(getattr(pairs, name)[own] for name in ("span", "modality", "text_hash", "group")))
        nce = info_nce(*sides, mine, 0.07, gather)
        return nce, torch.autograd.grad(nce.items_P.sum(), sides)

    whole = info_nce(left, right, pairs, 0.07)
    wanted = torch.autograd.grad(whole.items_P.sum(), (left, right))
    for (part, got), own in zip(in_ranks(len(rows), work), rows, strict=True):
        torch.testing.assert_close(part.items_P, whole.items_P[own], rtol=1e-12, atol=1e-13)
        for name in ("correct_P2", "negatives_P", "masked_P"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[own]), name
        for mine, gradient in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, gradient[own], rtol=1e-11, atol=1e-13)


def test_a_rank_without_pairs_takes_part_in_the_backward_pass_of_the_others() -> None:
    """Its own loss is zero, but its graph holds the gather, whose backward is a collective."""
    empty = torch.zeros(0, E, requires_grad=True)
    seen = []

    def gather(rows):
        every = torch.cat([rows, rows.new_ones(3, *rows.shape[1:])])
        if every.requires_grad:
            every.register_hook(lambda gradient: seen.append(gradient.abs().sum().item()))
        return every, 0

    nce = info_nce(empty, empty, pairs_of([], []), 0.07, gather)
    nce.items_P.sum().backward()
    assert nce.items_P.shape == (0,) and nce.correct_P2.shape == (0, 2) and seen == [0.0]
