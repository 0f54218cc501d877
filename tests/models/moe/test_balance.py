"""The levels of the load-balancing loss against plain loops in float64, and the rule that moves the bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.balance import ExpertLoadAccumulator, balance_loss, update_expert_bias
from mmoe.models.moe.layer import MoEConfig, MoELayer
from mmoe.models.moe.router import Router
from mmoe.models.moe.tokens import Tokens
from tests.models.random_batch import INPUTS, pack, random_batch, random_sequences

D, E, K = 16, 5, 2


def build(**changes) -> MoELayer:
    layer = MoELayer(
        D, MoEConfig(**{"n_experts": E, "top_k": K, "intermediate_size": 8, "expert_backend": "loop"} | changes)
    ).double()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def hidden(batch, seed: int = 1) -> torch.Tensor:
    return torch.randn(*batch.shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(groups: list[list[tuple[list[float], list[int]]]], chosen_in: list | None = None) -> float:
    """Mean over groups of E sum_e f_e P_e; a group lists (scores, chosen experts) of its tokens. With `chosen_in`
    f of group i is counted there."""
    losses = []
    for group, counted in zip(groups, chosen_in or groups):
        choices = [e for _, chosen in counted for e in chosen]
        loss = 0.0
        for e in range(E):
            probability = sum(scores[e] / sum(scores) for scores, _ in group) / len(group)
            loss += E * choices.count(e) / len(choices) * probability
        losses.append(loss)
    return sum(losses) / len(losses)


def tokens_of(layer: MoELayer, x: torch.Tensor, batch) -> list[list[tuple[list[float], list[int]]]]:
    """(scores, choices) of the valid tokens, by sequence."""
    tokens = Tokens.from_batch(batch)
    routing = layer.router(tokens.gather_valid(x))
    rows = list(zip(routing.scores_TE.tolist(), routing.expert_TK.tolist()))
    return [[rows[t] for t in (tokens.sequence_T == b).nonzero().flatten()] for b in range(batch.shape[0])]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_every_level_is_what_its_formula_says(score, capacity_factor):
    layer = build(score_func=score, capacity_factor=capacity_factor)
    batches = [random_batch(seed, sequences=2 + seed) for seed in range(3)]  # the micro-batches of one step
    loads, before = ExpertLoadAccumulator(), []
    for number, batch in enumerate(batches):
        x = hidden(batch, number)
        _, routed = layer(x, Tokens.from_batch(batch))
        sequences = tokens_of(layer, x, batch)
        together = [row for sequence in sequences for row in sequence]
        before += together
        loads.add(routed.load_E[None])
        micro = balance_loss(routed.load_E, routed.probability_E)
        step = balance_loss(loads.total()[0], routed.probability_E)
        assert routed.balance_loss.item() == pytest.approx(by_loops(sequences), rel=1e-12)
        assert micro.item() == pytest.approx(by_loops([together]), rel=1e-12)
        assert step.item() == pytest.approx(by_loops([together], [before]), rel=1e-12)
        assert not routed.load_E.requires_grad and routed.probability_E.requires_grad
    assert loads.total().sum() == sum(int(batch.valid.sum()) for batch in batches) * K  # before any drop


def test_ranks_add_their_loads_and_then_agree():
    """Two ranks with the sequences of one: the global level knows the loads of both."""
    layer, sequences = build(), random_sequences(5, 4, 3)
    length = pack(sequences).shape[1]
    whole, *halves = (pack(part, length) for part in (sequences, sequences[:2], sequences[2:]))
    x = hidden(whole)
    routed = [layer(y, Tokens.from_batch(batch))[1] for y, batch in zip((x, x[:2], x[2:]), (whole, *halves))]
    counts = [r.load_E[None] for r in routed]
    for mine, other in ((1, 2), (2, 1)):
        loads = ExpertLoadAccumulator(reduce=lambda load, other=other: load + counts[other])
        loads.add(counts[mine])
        assert torch.equal(loads.total(), counts[0])
        assert torch.equal(loads.total(), counts[0])  # asking twice counts nothing twice
    tokens = [int(batch.valid.sum()) for batch in halves]
    means = sum(n * balance_loss(routed[0].load_E, r.probability_E) for n, r in zip(tokens, routed[1:])) / sum(tokens)
    torch.testing.assert_close(means, balance_loss(routed[0].load_E, routed[0].probability_E))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), score=st.sampled_from(["softmax", "sigmoid"]), level=st.sampled_from(["s", "m"]))
def test_descent_lowers_the_most_and_raises_the_least_chosen_expert(seed, score, level):
    """Summed over tokens, the gradient pushes the logit of the busiest expert down and that of an idle one up."""
    batch = random_batch(seed % 40, sequences=1)
    layer = build(score_func=score, n_experts=6)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([2.0, 1.5, 0.0, 0.0, 0.0, -0.5])  # experts 0 and 1 take all tokens
        layer.router.weight[:, 1:] = 0.02 * torch.randn(6, D - 1, generator=torch.Generator().manual_seed(seed))
    x = hidden(batch, seed)
    x[..., 0] = 1.0
    logits = []
    layer.router.register_forward_hook(lambda module, args, out: (logits.append(out.logits_TE), None)[1])
    _, routed = layer(x, Tokens.from_batch(batch))
    loss = routed.balance_loss if level == "s" else balance_loss(routed.load_E, routed.probability_E)
    (gradient,) = torch.autograd.grad(loss, logits[0])
    assert routed.load_E.tolist() == [int(batch.valid.sum())] * 2 + [0] * 4
    pushed = gradient.sum(0)
    assert pushed[0] > 0 and pushed[1] > 0 and (pushed[2:] < 0).all()


def test_padding_alone_is_balanced_at_zero():
    batch = pack([[], []], length=8)
    layer = build(bias_update_rate=0.1, router_noise=1.0, score_func="sigmoid")
    out, routed = layer(hidden(batch), Tokens.from_batch(batch))
    assert (out == 0).all()
    level = balance_loss(routed.load_E, routed.probability_E)
    assert routed.balance_loss == level == routed.z_loss == routed.load_E.sum() == 0
    (level + routed.balance_loss).backward()
    update_expert_bias([layer.router], routed.load_E[None], 0.1)
    assert (layer.router.expert_bias == 0).all()


def test_loads_that_were_not_counted_are_an_error():
    with pytest.raises(ValueError, match="no loads were counted"):
        ExpertLoadAccumulator().total()


@settings(max_examples=50, deadline=None)
@given(
    load=st.lists(st.lists(st.integers(0, 2**40), min_size=4, max_size=4), min_size=1, max_size=3),
    rate=st.sampled_from([0.25, 0.001]),
)
def test_the_bias_moves_by_the_sign_of_what_is_missing(load, rate):
    routers = [Router(8, 4, 2, True, 1.0, biased=True) for _ in load]
    for router in routers:
        router.expert_bias.fill_(0.5)
    update_expert_bias(routers, torch.tensor(load), rate)
    for router, row in zip(routers, load):
        for expert, count in enumerate(row):
            short = sum(row) - 4 * count
            expected = 0.5 + rate * ((short > 0) - (short < 0))
            assert float(router.expert_bias[expert]) == pytest.approx(expected, rel=1e-6)
        assert router.expert_bias.dtype is torch.float32


def test_the_bias_evens_the_load_of_a_skewed_router():
    torch.manual_seed(0)
    router = Router(16, 8, 2, True, 1.0, score="sigmoid", biased=True)
    torch.nn.init.normal_(router.weight, std=0.2)
    x = torch.randn(4096, 16)
    x[:, 0] = 3.0
    with torch.no_grad():
        router.weight[:2, 0] = 0.8

    def skew() -> float:
        load = router(x).expert_TK.flatten().bincount(minlength=8)
        return float(load.max() / load.double().mean())

    assert skew() > 3
    for _ in range(300):
        load = router(x).expert_TK.flatten().bincount(minlength=8)
        update_expert_bias([router], load[None], 0.01)
    assert skew() < 1.2


def test_loads_of_all_layers_are_one_tensor_in_the_order_of_the_routers():
    moe = MoEConfig(n_experts=4, top_k=2, intermediate_size=16, first_k_dense=1, bias_update_rate=0.5)
    model = ModelConfig(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, intermediate_size=48, moe=moe).build(
        INPUTS, seed=0
    )
    batch = random_batch(1)
    output = model(batch)
    assert output.auxiliary.load_NE.shape == output.auxiliary.probability_NE.shape == (2, 4)
    assert torch.equal(output.auxiliary.load_NE, output.routing.load_NMSE.sum((1, 2)))
    routers = model.decoder.routers
    assert routers == [model.decoder.blocks[1].feed_forward.router, model.decoder.blocks[2].feed_forward.router]
    assert all((router.expert_bias == 0).all() for router in routers)
    assert {name.split(".")[-1] for name, _ in model.named_buffers()} == {"expert_bias"}


def test_an_evaluation_changes_no_bias_and_a_step_that_was_recomputed_counts_once():
    layer = build(bias_update_rate=0.5)
    batch = random_batch(2)
    x = hidden(batch)
    counted = layer(x, Tokens.from_batch(batch))[1].load_E
    loads = []

    def run(y):
        out, routed = layer(y, Tokens.from_batch(batch))
        loads.append(routed.load_E)
        return out, routed.load_E

    with set_checkpoint_early_stop(False):
        out, load = checkpoint(run, x.requires_grad_(), use_reentrant=False)
        out.sum().backward()
    assert len(loads) == 2 and torch.equal(load, counted)
    layer.eval()(x, Tokens.from_batch(batch))
    assert (layer.router.expert_bias == 0).all()
