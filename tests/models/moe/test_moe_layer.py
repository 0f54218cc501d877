from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from mmoe.models.moe.layer import MoEConfig, MoELayer
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.models.moe.tokens import Tokens
from mmoe.schema.batch import PackedBatch
from tests.models.random_batch import SOURCES, pack, random_batch, random_sequences

D = 16


def build(**changes) -> MoELayer:
    """float64, with every parameter random."""
    shape = {"n_experts": 4, "top_k": 2, "intermediate_size": 8, "expert_backend": "loop"}
    layer = MoELayer(D, MoEConfig(**shape | changes)).double()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(batch: PackedBatch) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*batch.shape, D, dtype=torch.float64, requires_grad=True)


def reference(layer: MoELayer, x_BLD: torch.Tensor, batch: PackedBatch, normalize: bool = True) -> torch.Tensor:
    """Every expert on every token, each weighted by the token's weight for it."""
    scores = torch.softmax(x_BLD @ layer.router.weight.T, dim=-1)
    chosen = scores >= scores.sort(-1, descending=True).values[..., 1:2]
    weights = torch.where(chosen, scores, 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = layer.experts
    hidden = F.silu(torch.einsum("bld,edf->blef", x_BLD, experts.gate))
    hidden = hidden * torch.einsum("bld,edf->blef", x_BLD, experts.up)
    out = torch.einsum("blef,efd,ble->bld", hidden, experts.down, weights)
    if layer.shared is not None:
        out = out + layer.shared(x_BLD)
    return torch.where(batch.valid[..., None], out, 0)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_layer_equals_a_dense_loop_in_values_and_gradients(shared, normalize):
    batch = random_batch(0)
    layer, x = build(n_shared_experts=shared, norm_topk_prob=normalize), inputs(batch)
    ours, theirs = layer(x, Tokens.from_batch(batch))[0], reference(layer, x, batch, normalize)
    weights = torch.randn_like(ours)
    variables = [x, *layer.parameters()]
    results = ([out, *torch.autograd.grad((out * weights).sum(), variables)] for out in (ours, theirs))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_capacity_equals_dropless_when_nothing_overflows():
    batch = random_batch(2, sequences=3)
    results = []
    for factor in (None, 2.0):  # E / K: room for every token of a sequence at one expert
        layer, x = build(capacity_factor=factor, n_shared_experts=1), inputs(batch)
        out, routing = layer(x, Tokens.from_batch(batch))
        assert routing.statistics.drops_NMSE.sum() == 0
        weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropped_tokens_get_nothing_but_the_shared_expert():
    batch = random_batch(2, sequences=3)
    layer, x = build(capacity_factor=1.0, n_shared_experts=1), inputs(batch)
    with torch.no_grad():
        layer.router.weight[:2] = 0
        layer.router.weight[2:] = -x[batch.valid].mean(0) * 50  # most tokens want experts 0 and 1
    tokens = Tokens.from_batch(batch)
    out, routing = layer(x, tokens)
    permutation = layer.dispatcher.plan(layer.router(tokens.gather_valid(x)), tokens)
    dropped = permutation.dropped_TK.all(1)
    assert dropped.any() and not dropped.all()
    assert routing.statistics.drops_NMSE.sum() == permutation.dropped_TK.sum()
    taken = tokens.gather_valid(out)
    torch.testing.assert_close(taken[dropped], layer.shared(tokens.gather_valid(x))[dropped])
    assert ((taken - layer.shared(tokens.gather_valid(x)))[~dropped].abs().amax(1) > 0).all()


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_gradcheck(capacity_factor):
    batch = pack([random_sequences(11, 1, 1)[0][:1]])
    layer = build(n_experts=3, intermediate_size=3, capacity_factor=capacity_factor, n_shared_experts=1)
    tokens = Tokens.from_batch(batch)
    names = [name for name, _ in layer.named_parameters()]
    x = inputs(batch)

    def run(x, *parameters):
        out, routing = torch.func.functional_call(layer, dict(zip(names, parameters)), (x, tokens))
        return out, routing.balance_loss, routing.z_loss

    scores = layer.router(tokens.gather_valid(x)).scores_TE.sort(1, descending=True).values
    assert (scores[:, 1] - scores[:, 2]).min() > 1e-4  # away from top-k ties
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_losses_are_per_sequence_and_meaned():
    batch = random_batch(3, sequences=3)
    layer, x = build(), inputs(batch)
    _, routed = layer(x, Tokens.from_batch(batch))
    balance, z = [], []
    for b in range(3):
        logits = (x[b] @ layer.router.weight.T)[batch.valid[b]]
        scores = logits.softmax(1)
        chosen = F.one_hot(scores.topk(2).indices, 4).sum(1).double()
        balance.append(4 * (chosen.mean(0) / 2 * scores.mean(0)).sum())
        z.append(logits.logsumexp(1).square().mean())
    torch.testing.assert_close(routed.balance_loss, torch.stack(balance).mean())
    torch.testing.assert_close(routed.z_loss, torch.stack(z).mean())


def test_balance_loss_is_one_when_balanced_and_grows_to_e_over_k():
    batch = random_batch(3)
    layer, x = build(), inputs(batch)
    with torch.no_grad():
        layer.router.weight.zero_()
    assert layer(x, Tokens.from_batch(batch))[1].balance_loss.item() == pytest.approx(1)
    ones = torch.ones_like(x)
    with torch.no_grad():
        layer.router.weight[:2] = 10
    assert layer(ones, Tokens.from_batch(batch))[1].balance_loss.item() == pytest.approx(2)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_statistics_count_valid_tokens_before_any_drop(capacity_factor):
    batch = random_batch(4, sequences=3, documents=5)
    layer, x = build(capacity_factor=capacity_factor), inputs(batch)
    tokens = Tokens.from_batch(batch)
    statistics = layer(x, tokens)[1].statistics
    routing = layer.router(tokens.gather_valid(x))
    dropped = layer.dispatcher.plan(routing, tokens).dropped_TK
    load, drops = torch.zeros(1, 7, SOURCES, 4).long(), torch.zeros(1, 7, SOURCES, 4).long()
    modality, source = batch.modality[batch.valid].tolist(), batch.source[batch.valid].tolist()
    for t, chosen in enumerate(routing.expert_TK.tolist()):
        for k, e in enumerate(chosen):
            load[0, modality[t], source[t], e] += 1
            drops[0, modality[t], source[t], e] += int(dropped[t, k])
    assert torch.equal(statistics.load_NMSE, load[:, :, : statistics.load_NMSE.shape[2]])
    assert torch.equal(statistics.drops_NMSE, drops[:, :, : statistics.load_NMSE.shape[2]])
    assert statistics.tokens_N.tolist() == [batch.valid.sum()]
    assert bool(statistics.drops_NMSE.any()) == (capacity_factor is not None)
    logits = routing.logits_TE.detach()
    torch.testing.assert_close(statistics.logit_mean_NE[0], logits.mean(0))
    torch.testing.assert_close(statistics.logit_variance_NE[0], logits.var(0, unbiased=False))
    torch.testing.assert_close(statistics.importance_NE[0], logits.softmax(1).sum(0))
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    torch.testing.assert_close(statistics.entropy_N[0], entropy)
    assert not any(value.requires_grad for value in vars(statistics).values())


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    sequences = random_sequences(5, 4, 3)
    sequences[0][0].source = SOURCES - 1
    for document in (d for sequence in sequences[2:] for d in sequence):
        document.source = 0  # the second half knows fewer sources
    layer = build()
    length = pack(sequences).shape[1]
    whole, *halves = (pack(part, length) for part in (sequences, sequences[:2], sequences[2:]))
    x = inputs(whole)
    parts = [x, x[:2], x[2:]]
    total, a, b = (layer(x, Tokens.from_batch(batch))[1].statistics for x, batch in zip(parts, (whole, *halves)))
    for name, value in vars(a + b).items():
        torch.testing.assert_close(value, getattr(total, name))
    assert torch.equal((b + a).load_NMSE, total.load_NMSE)
    both = RoutingStatistics.stack([total, total])
    assert both.load_NMSE.shape[0] == 2 and torch.equal(both.drop_rate_N, total.drop_rate_N.repeat(2))


def test_no_statistics_in_evaluation_and_padding_gets_zeros():
    batch = random_batch(6)
    layer, x = build(n_shared_experts=1).eval(), inputs(batch)
    out, routed = layer(x, Tokens.from_batch(batch))
    assert routed.statistics is None
    assert (out[~batch.valid] == 0).all()


def test_padding_is_never_routed():
    batch = random_batch(6)
    x = inputs(batch).detach()
    changed = torch.where(batch.valid[..., None], x, x * 100 + 7)
    for factor in (None, 1.0):
        layer = build(capacity_factor=factor)
        (a, routed_a), (b, routed_b) = (layer(y, Tokens.from_batch(batch)) for y in (x, changed))
        assert torch.equal(a, b)
        assert torch.equal(routed_a.statistics.load_NMSE, routed_b.statistics.load_NMSE)
        assert routed_a.balance_loss == routed_b.balance_loss


def test_capacity_of_a_sequence_does_not_depend_on_the_others():
    sequences = random_sequences(8, 3, 3)
    length = pack(sequences).shape[1]
    together = pack(sequences, length)
    layer, x = build(capacity_factor=1.0), inputs(together)
    out, _ = layer(x, Tokens.from_batch(together))
    for b, sequence in enumerate(sequences):
        alone, _ = layer(x[b : b + 1], Tokens.from_batch(pack([sequence], length)))
        torch.testing.assert_close(alone[0], out[b], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"top_k": 5}, "there are 4 experts"),
        ({"intermediate_size": 12, "expert_backend": "grouped_mm"}, "multiple of 8"),
        ({"capacity_factor": 0.9}, "greater than or equal to 1"),
    ],
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        build(**changes)


def test_source_tables_follow_the_batch():
    batch = random_batch(0)
    few = replace(batch, source=batch.source.clamp(max=0), documents=[[(0, 0, 0, 0)] * len(d) for d in batch.documents])
    assert Tokens.from_batch(few).sources == 1
