import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.balance import expert_load
from mmoe.models.moe.dispatch import CapacityDispatcher, DroplessDispatcher
from mmoe.models.moe.layer import MoEConfig
from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics, capacities, router_gradient_norms
from mmoe.models.moe.tokens import Tokens
from tests.models.moe.test_dispatch import random_routing
from tests.models.random_batch import INPUTS, pack, random_batch, random_sequences

COUNTS = ("load_NMSE", "drops_NMSE", "would_drop_NC", "tokens_N")
MOE = MoEConfig(n_experts=4, top_k=2, intermediate_size=8, expert_backend="loop", capacity_factor=1.0)


def build(**changes):
    config = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=16, **{"moe": MOE} | changes
    )
    return config.build(INPUTS, seed=0).double()


def loss(output):
    return output.hidden.square().sum() + output.auxiliary.balance_loss + output.auxiliary.z_loss


def check(found: RoutingStatistics, expected: RoutingStatistics) -> None:
    for name, value in vars(expected).items():
        if name in COUNTS:
            assert torch.equal(getattr(found, name), value), name
        else:
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-12, atol=1e-12)


@given(length=st.integers(1, 9000), experts=st.integers(1, 300), top_k=st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_capacities_are_the_dispatchers_and_exact(length, experts, top_k):
    found = capacities(length, top_k, experts).tolist()
    assert found == [CapacityDispatcher(experts, factor).capacity(length, top_k) for factor in CAPACITY_FACTORS]
    assert found == [math.ceil(Fraction(n, 20) * length * top_k / experts) for n in range(20, 41)]


def test_a_factor_is_what_was_written_and_not_its_rounding_up():
    """In floating point 1.1 * 90 / 3 is above 33."""
    assert math.ceil(1.1 * 90 / 3) == 34
    assert CapacityDispatcher(3, 1.1).capacity(90, 1) == 33
    assert capacities(90, 1, 3)[CAPACITY_FACTORS.index(1.1)] == 33


@pytest.mark.parametrize("seed", range(3))
def test_would_drop_is_what_a_layer_of_that_capacity_drops(seed):
    batch = random_batch(seed, sequences=3)
    tokens = Tokens.from_batch(batch)
    routing = random_routing(len(tokens.position_T), 8, 3, seed)
    routing.expert_TK[: len(tokens.position_T) // 2] %= 5  # some are overloaded
    dropless = RoutingStatistics.from_routing(
        routing, DroplessDispatcher(8).plan(routing, tokens), tokens, expert_load(routing, tokens)
    )
    drops = []
    for factor in CAPACITY_FACTORS:
        permutation = CapacityDispatcher(8, factor).plan(routing, tokens)
        limited = RoutingStatistics.from_routing(routing, permutation, tokens, expert_load(routing, tokens))
        assert torch.equal(limited.would_drop_NC, dropless.would_drop_NC)
        assert limited.drops_NMSE.sum() == permutation.dropped_TK.sum()
        drops.append(int(limited.drops_NMSE.sum()))
    assert dropless.would_drop_NC.tolist() == [drops]
    assert drops[0] > drops[-1] >= 0 and dropless.drops_NMSE.sum() == 0
    torch.testing.assert_close(dropless.would_drop_rate_NC[0, 0].item(), drops[0] / routing.expert_TK.numel())


def test_accumulation_adds_up_to_the_whole():
    sequences = random_sequences(5, 4, 3)
    length = pack(sequences).shape[1]
    model = build()
    whole = model(pack(sequences, length)).routing
    parts = [model(pack([sequence], length)).routing for sequence in sequences]
    assert whole.drops_NMSE.sum() > 0
    check(sum(parts[1:], parts[0]), whole)


def test_recomputation_counts_once_in_every_micro_batch():
    sequences = random_sequences(5, 4, 3)
    length = pack(sequences).shape[1]
    totals = []
    for recompute in (False, True):
        model, routed = build(), []
        for block in model.decoder.blocks:
            block.feed_forward.router.register_forward_pre_hook(lambda *args, routed=routed: routed.append(args))
            if recompute:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        total = None
        for sequence in sequences:
            output = model(pack([sequence], length))
            loss(output).backward()
            total = output.routing if total is None else total + output.routing
        assert len(routed) == 4 * 2 * (2 if recompute else 1)
        totals.append((total, router_gradient_norms(model.decoder.routers)))
    (expected, norms), (found, again) = totals
    check(found, expected)
    torch.testing.assert_close(again, norms, rtol=1e-12, atol=0)


def test_evaluation_in_between_is_not_counted_and_leaves_the_router_gradients():
    batch, other = random_batch(1), random_batch(2)
    model = build()
    expected = model(batch).routing
    loss(model(batch)).backward()
    norms = router_gradient_norms(model.decoder.routers)
    with torch.no_grad():
        assert model.eval()(other).routing is None
    model.train()
    check(model(batch).routing, expected)
    assert torch.equal(router_gradient_norms(model.decoder.routers), norms)


def test_what_stands_in_padding_is_not_counted():
    batch = random_batch(6)
    model = build()
    expected = model(batch).routing
    garbage = torch.where(batch.valid, batch.token_ids, batch.token_ids.new_tensor(3))
    modality = torch.where(batch.valid, batch.modality, batch.modality.new_tensor(5))
    found = model(type(batch)(**vars(batch) | {"token_ids": garbage, "modality": modality})).routing
    assert not torch.equal(garbage, batch.token_ids)
    check(found, expected)
    assert expected.tokens_N.tolist() == [int(batch.valid.sum())] * 2
    assert expected.load_NMSE.sum() == 2 * 2 * batch.valid.sum()


def test_sequences_of_padding_alone_add_nothing():
    sequences = random_sequences(4, 2, 3)
    model = build()
    length = pack(sequences).shape[1]
    check(model(pack([*sequences, []], length)).routing, model(pack(sequences, length)).routing)


def test_router_gradient_norms_are_those_of_each_expert():
    model, batch = build(), random_batch(3)
    loss(model(batch)).backward()
    found = router_gradient_norms(model.decoder.routers)
    rows = [[row.norm() for row in block.feed_forward.router.weight.grad] for block in model.decoder.blocks]
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64))
    assert found.shape == (2, 4) and (found > 0).all()
    loss(model(batch)).backward()  # the same micro-batch once more
    torch.testing.assert_close(router_gradient_norms(model.decoder.routers), 2 * found)


def test_router_gradient_norms_of_huge_gradients_are_finite():
    model = build().float()
    for router in model.decoder.routers:
        router.weight.grad = torch.full_like(router.weight, 1e20)
    norms = router_gradient_norms(model.decoder.routers)
    torch.testing.assert_close(norms, torch.full_like(norms, 1e20 * router.weight.shape[1] ** 0.5), rtol=1e-6, atol=0)


def test_router_gradients_of_a_frozen_router_are_zero_and_a_dense_model_has_none():
    model = build()
    model.decoder.blocks[0].feed_forward.router.weight.requires_grad_(False)
    loss(model(random_batch(3))).backward()
    norms = router_gradient_norms(model.decoder.routers)
    assert (norms[0] == 0).all() and (norms[1] > 0).all()
    assert router_gradient_norms(build(moe=None).decoder.routers) is None


def test_entropy_of_certainty_is_zero():
    tokens = Tokens.from_batch(random_batch(0))
    routing = random_routing(len(tokens.position_T), 4, 1, 0)
    routing.probability_TE.copy_(torch.nn.functional.one_hot(routing.expert_TK[:, 0], 4))
    found = RoutingStatistics.from_routing(
        routing, DroplessDispatcher(4).plan(routing, tokens), tokens, expert_load(routing, tokens)
    )
    assert found.entropy_N.tolist() == [0]
    assert found.importance_NE.sum() == len(tokens.position_T)
