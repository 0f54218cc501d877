import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.models.moe.dispatch import CapacityDispatcher, DroplessDispatcher
from mmoe.models.moe.router import Routing
from mmoe.models.moe.rows import permute_tokens, unpermute_tokens
from mmoe.models.moe.tokens import Tokens
from tests.models.random_batch import random_batch


def random_routing(tokens: int, experts: int, top_k: int, seed: int, levels: int = 1000) -> Routing:
    """Few `levels` of score make many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, levels, (tokens, experts), generator=generator).double() / levels
    expert = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    score = scores.gather(1, expert)
    probability = scores / scores.sum(1, keepdim=True)
    return Routing(scores.log(), scores, probability, expert, score, score / score.sum(1, keepdim=True))


def kept_by_brute_force(routing: Routing, tokens: Tokens, capacity: int, drop: str) -> set[tuple[int, int]]:
    """(token, k): for each sequence and expert the best-scored (or first) tokens, earlier ones first among equals."""
    kept = set()
    experts = routing.scores_TE.shape[1]
    for b in range(tokens.sequences):
        for e in range(experts):
            wanted = [
                (0 if drop == "position" else -routing.score_TK[t, k].item(), t, k)
                for t, k in (routing.expert_TK == e).nonzero().tolist()
                if tokens.sequence_T[t] == b
            ]
            kept |= {(t, k) for _, t, k in sorted(wanted)[:capacity]}
    return kept


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.sampled_from([3, 5, 8]),
    top_k=st.integers(1, 3),
    factor=st.floats(0.3, 2.5),
    levels=st.sampled_from([3, 1000]),
    drop=st.sampled_from(["probs", "position"]),
    multiple=st.sampled_from([1, 16]),
)
def test_capacity_drops_the_lowest_scores_or_the_later_tokens_of_each_sequence(
    seed, experts, top_k, factor, levels, drop, multiple
):
    tokens = Tokens.from_batch(random_batch(seed % 50, sequences=3, documents=2))
    routing = random_routing(len(tokens.position_T), experts, top_k, seed, levels)
    dispatcher = CapacityDispatcher(experts, factor, drop, multiple)
    capacity = dispatcher.capacity(tokens.length, top_k)
    assert capacity == math.ceil(Fraction(str(factor)) * tokens.length * top_k / experts)
    permutation = dispatcher.plan(routing, tokens)
    kept = {tuple(at) for at in (~permutation.dropped_TK).nonzero().tolist()}
    assert kept == kept_by_brute_force(routing, tokens, capacity, drop)
    rows = -(-tokens.sequences * capacity // multiple) * multiple
    assert permutation.ends_E.tolist() == [rows * (e + 1) for e in range(experts)]  # whatever was routed
    check_rows(permutation, routing, experts)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.sampled_from([2, 8]),
    top_k=st.integers(1, 2),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_dropless_gives_every_choice_a_row(seed, experts, top_k, multiple):
    tokens = Tokens.from_batch(random_batch(seed % 50))
    routing = random_routing(len(tokens.position_T), experts, top_k, seed)
    permutation = DroplessDispatcher(experts, multiple).plan(routing, tokens)
    assert not permutation.dropped_TK.any()
    choices = permutation.slot_R[permutation.slot_R < routing.expert_TK.numel()]
    assert choices.sort().values.tolist() == list(range(routing.expert_TK.numel()))
    assert not (permutation.ends_E % multiple).any()
    assert permutation.complete == (multiple == 1)
    check_rows(permutation, routing, experts)


def check_rows(permutation, routing, experts):
    """Rows and choices are each other's inverse, and every row is in the group of its expert."""
    top_k = routing.expert_TK.shape[1]
    starts = [0, *permutation.ends_E[:-1].tolist()]
    assert permutation.ends_E[-1] == len(permutation.slot_R)
    filled = (permutation.slot_R < routing.expert_TK.numel()).nonzero().flatten().tolist()
    for row in filled:
        t, k = divmod(permutation.slot_R[row].item(), top_k)
        assert permutation.row_TK[t, k] == row
        e = routing.expert_TK[t, k]
        assert starts[e] <= row < permutation.ends_E[e]
    assert len(filled) == (~permutation.dropped_TK).sum()


@pytest.mark.parametrize(
    "dispatcher",
    [
        DroplessDispatcher(4),
        DroplessDispatcher(4, 16),
        CapacityDispatcher(4, 0.5),
        CapacityDispatcher(4, 0.5, "position"),
    ],
    ids=["dropless", "padded", "capacity", "position"],
)
def test_dispatch_and_combine_copy_rows_and_their_gradients(dispatcher):
    tokens = Tokens.from_batch(random_batch(0))
    routing = random_routing(len(tokens.position_T), 4, 2, 0)
    permutation = dispatcher.plan(routing, tokens)
    x = torch.randn(len(tokens.position_T), 6, dtype=torch.float64, requires_grad=True)
    rows = dispatcher.dispatch(x, permutation)
    for row, choice in enumerate(permutation.slot_R.tolist()):
        expected = x[choice // 2] if choice < routing.expert_TK.numel() else torch.zeros(6)
        assert torch.equal(rows[row], expected.double())
    combined = dispatcher.combine(rows, routing.weight_TK, permutation)
    kept = torch.where(permutation.dropped_TK, 0, routing.weight_TK).sum(1, keepdim=True)
    torch.testing.assert_close(combined, x * kept)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((combined * weights).sum(), x)
    torch.testing.assert_close(gradient, weights * kept)


def test_copying_has_the_gradient_of_indexing():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 6, 0, 1, 5])  # choice 6 is past the end; choices 2 and 3 (of row 1) go nowhere
    inverse = torch.tensor([2, 3, 5, 5, 0, 4])
    assert torch.autograd.gradcheck(lambda x: permute_tokens(x, index, inverse, share=2), x)


@pytest.mark.parametrize("complete", [False, True])
def test_weighted_rows_have_the_gradient_of_the_sum(complete):
    """Also of the weights; row 5 is past the end of y, and choice 6 past the end of the weights."""
    row = torch.tensor([[2, 3], [0, 4], [1, 5]]) if complete else torch.tensor([[2, 3], [5, 5], [0, 4]])
    choice = torch.tensor([2, 4, 0, 1, 3, 5]) if complete else torch.tensor([4, 6, 0, 1, 5])
    y = torch.randn(len(choice), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.cat([y, y.new_zeros(1, 3)])
    expected = (padded[row] * weight.unsqueeze(2)).sum(1)
    torch.testing.assert_close(unpermute_tokens(y, weight, row, choice, complete), expected)
    assert torch.autograd.gradcheck(lambda y, w: unpermute_tokens(y, w, row, choice, complete), (y, weight))


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_taken_from_their_positions_and_put_back(padded):
    batch = random_batch(1)
    if not padded:
        length = int(batch.valid.sum(1).min())
        names = ("token_ids", "document", "modality", "source")
        batch = replace(batch, **{name: getattr(batch, name)[:, :length] for name in names})
    tokens = Tokens.from_batch(batch)
    x = torch.randn(*batch.shape, 3, dtype=torch.float64, requires_grad=True)
    taken = tokens.gather_valid(x)
    assert torch.equal(taken, x[batch.valid])
    back = tokens.scatter_valid(taken)
    assert torch.equal(back, torch.where(batch.valid[..., None], x, 0))
    (gradient,) = torch.autograd.grad(back.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * torch.where(batch.valid[..., None], x, 0))
    assert tokens.modality_T.tolist() == batch.modality[batch.valid].tolist()
    assert tokens.source_T.tolist() == batch.source[batch.valid].tolist()
