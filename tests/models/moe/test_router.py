import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from mmoe.models.moe.layer import MoEConfig
from mmoe.models.moe.router import GroupLimit, Router


def router(experts: int, top_k: int, normalize: bool = True, scale: float = 1.0, **options) -> Router:
    made = Router(16, experts, top_k, normalize, scale, **options)
    torch.nn.init.normal_(made.weight)
    return made


def of_logits(logits_TE: torch.Tensor, top_k: int, **options) -> Router:
    """A router whose logits are its input."""
    experts = logits_TE.shape[1]
    options = {"normalize": True, "scale": 1.0} | options
    made = Router(experts, experts, top_k, **options).to(logits_TE.dtype)
    with torch.no_grad():
        made.weight.copy_(torch.eye(experts))
    return made


def test_routing_is_the_top_k_of_the_softmax():
    torch.manual_seed(0)
    x = torch.randn(50, 16)
    made = router(6, 3, scale=2.5)
    routing = made(x)
    scores = torch.softmax(x @ made.weight.T, dim=1)
    torch.testing.assert_close(routing.scores_TE, scores)
    for t in range(50):
        best = sorted(range(6), key=lambda e: -scores[t, e])[:3]
        assert routing.expert_TK[t].tolist() == best
        torch.testing.assert_close(routing.score_TK[t], scores[t, best])
        torch.testing.assert_close(routing.weight_TK[t], 2.5 * scores[t, best] / scores[t, best].sum())
    assert torch.equal(
        router(6, 3, normalize=False)(x).weight_TK.sort(descending=True).indices[:, 0], torch.zeros(50).long()
    )


def test_of_equal_scores_the_lower_expert_wins():
    made = router(9, 4)
    with torch.no_grad():  # small integers: their sums are exact, so equal experts have equal logits
        made.weight[:] = torch.randint(-3, 4, (16,))
        made.weight[7] = 0
    x = torch.randint(-3, 4, (20, 16)).float()
    for t, chosen in enumerate(made(x).expert_TK.tolist()):
        logit = x[t] @ made.weight[0]
        assert chosen == ([7, 0, 1, 2] if logit < 0 else [0, 1, 2, 3])


def test_a_lone_choice_still_has_a_gradient_through_its_score():
    x = torch.randn(20, 16)
    made = router(4, 1, normalize=False)
    made(x).weight_TK.sum().backward()
    assert (made.weight.grad != 0).any()


def test_logits_are_float32_under_autocast():
    made = router(4, 2)
    x = torch.randn(30, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = made(x)
    assert torch.equal(routing.logits_TE, x.float() @ made.weight.T)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_and_weights_are_those_of_plain_loops(score, normalize):
    if score == "softmax_topk" and not normalize:
        return  # a config that is refused
    logits = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4
    routing = of_logits(logits, 3, score=score, normalize=normalize, scale=1.5)(logits)
    for t, row in enumerate(logits.tolist()):
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in row]
        else:
            scores = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        chosen = sorted(range(7), key=lambda e: -row[e])[:3]
        weights = [scores[e] for e in chosen]
        if normalize:
            weights = [w / sum(weights) for w in weights]
        assert routing.expert_TK[t].tolist() == chosen
        assert routing.scores_TE[t].tolist() == pytest.approx(scores, rel=1e-12)
        assert routing.score_TK[t].tolist() == pytest.approx([scores[e] for e in chosen], rel=1e-12)
        assert routing.probability_TE[t].tolist() == pytest.approx([s / sum(scores) for s in scores], rel=1e-12)
        assert routing.weight_TK[t].tolist() == pytest.approx([1.5 * w for w in weights], rel=1e-12)
        if score == "softmax_topk":
            top = [math.exp(row[e]) for e in chosen]
            assert routing.weight_TK[t].tolist() == pytest.approx([1.5 * x / sum(top) for x in top], rel=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("low", [-30.0, -90.0, -500.0, -1e30])
def test_weights_add_up_to_scale_where_scores_underflow(score, low):
    """A normalizer with an epsilon of 1e-20 would give weights near zero from -46 on, and nothing from -104 on."""
    logits = torch.tensor([[low, low - 1, low - 2, low - 40], [low - 3, low, low, low - 3]]).requires_grad_()
    routing = of_logits(logits, 2, score=score, scale=2.5)(logits)
    torch.testing.assert_close(routing.weight_TK.sum(1), torch.full((2,), 2.5))
    assert routing.probability_TE.isfinite().all()
    if low > -1e30:  # there, a difference of 1 is below the resolution of float32
        assert routing.expert_TK.tolist() == [[0, 1], [1, 2]]
        share = 1 / (1 + math.exp(-1))
        torch.testing.assert_close(routing.weight_TK[0], 2.5 * torch.tensor([share, 1 - share]), rtol=1e-4, atol=0)
    (routing.weight_TK[:, 0].sum() + routing.probability_TE[:, 0].sum()).backward()
    assert logits.grad.isfinite().all()


def limited_by_brute_force(scores: list[float], count: int, topk_group: int, how: str, top_k: int) -> list[int]:
    """Groups by their score (lower number first among equals), then experts of those alike."""
    size = len(scores) // count
    parts = [sorted(scores[g * size : (g + 1) * size], reverse=True) for g in range(count)]
    group_score = [sum(part[:2]) if how == "top2" else part[0] for part in parts]
    kept = sorted(range(count), key=lambda g: (-group_score[g], g))[:topk_group]
    return sorted((e for e in range(len(scores)) if e // size in kept), key=lambda e: (-scores[e], e))[:top_k]


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([1, 2, 3, 4]),
    size=st.integers(1, 4),
    how=st.sampled_from(["top2", "max"]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    levels=st.sampled_from([3, 10**6]),
    data=st.data(),
)
def test_group_limited_choice_is_that_of_brute_force(count, size, how, score, levels, data):
    topk_group = data.draw(st.integers(1, count))
    top_k = data.draw(st.integers(1, topk_group * size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randint(-levels, levels, (12, count * size), generator=generator).double() / levels * 3
    bias = torch.randint(-4, 4, (count * size,), generator=generator).float() / 4
    made = of_logits(logits, top_k, score=score, groups=GroupLimit(count, topk_group, how))
    biased = of_logits(logits, top_k, score=score, groups=made.groups, biased=True)
    biased.expert_bias.copy_(bias)
    plain, moved = made(logits), biased(logits)
    for t, scores in enumerate(plain.scores_TE):
        for routing, value in ((plain, scores), (moved, scores + bias)):
            expected = limited_by_brute_force(value.tolist(), count, topk_group, how, top_k)
            assert routing.expert_TK[t].tolist() == expected
            torch.testing.assert_close(routing.score_TK[t], scores[expected])


def test_the_router_of_deepseek_v3_gives_the_same_choices_and_weights():
    """Sigmoid, groups, bias for the choice only, normalized and scaled: against transformers."""
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    theirs = DeepseekV3TopkRouter(config)
    groups = GroupLimit(4, 2)
    ours = Router(16, 12, 3, normalize=True, scale=2.5, score="sigmoid", groups=groups, biased=True)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_(std=0.5))
        ours.expert_bias.copy_(theirs.e_score_correction_bias.normal_(std=0.3))
    x = torch.randn(200, 16)
    routing, (logits, weights, chosen) = ours(x), theirs(x)
    torch.testing.assert_close(routing.logits_TE, logits)
    order, their_order = routing.expert_TK.argsort(1), chosen.argsort(1)
    assert torch.equal(routing.expert_TK.gather(1, order), chosen.gather(1, their_order))
    torch.testing.assert_close(routing.weight_TK.gather(1, order), weights.gather(1, their_order))


def test_the_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    made = of_logits(logits, 2, score="sigmoid", biased=True)
    before = made(logits)
    made.expert_bias.copy_(torch.tensor([-1.0, 0, 0, 1.0]))
    after = made(logits)
    assert before.expert_TK.tolist() == [[0, 1]] and after.expert_TK.tolist() == [[3, 1]]
    chosen = logits[0, [3, 1]].sigmoid()
    torch.testing.assert_close(after.weight_TK[0], chosen / chosen.sum())
    assert not made.expert_bias.requires_grad and "expert_bias" in made.state_dict()
    assert "expert_bias" not in router(4, 2).state_dict()


def test_noise_is_for_the_choice_alone():
    """Of two experts whose logits differ by d the lower is chosen with probability Phi(-d / (s sqrt 2))."""
    difference, deviation, tokens = 0.5, 0.8, 40_000
    logits = torch.tensor([[difference, 0.0]]).repeat(tokens, 1)
    made = of_logits(logits, 1, normalize=False)
    torch.manual_seed(0)
    routing, clean = made(logits, noise_TE=deviation * torch.randn_like(logits)), made(logits)
    expected = statistics.NormalDist().cdf(-difference / (deviation * math.sqrt(2)))
    spread = math.sqrt(expected * (1 - expected) / tokens)
    assert abs(float(routing.expert_TK.double().mean()) - expected) < 4 * spread
    assert torch.equal(routing.logits_TE, clean.logits_TE) and torch.equal(routing.scores_TE, clean.scores_TE)
    assert torch.equal(routing.weight_TK, clean.scores_TE.gather(1, routing.expert_TK))


@pytest.mark.parametrize("options", [{}, {"groups": GroupLimit(2, 1)}, {"biased": True}])
def test_a_logit_that_is_not_finite_spoils_its_token_alone(options):
    x = torch.randn(6, 16)
    made = router(4, 2, score="sigmoid", **options)
    clean = made(x)
    spoiled = x.clone()
    spoiled[2, 5], spoiled[4, 0] = float("nan"), float("inf")
    routing = made(spoiled)
    assert ((routing.expert_TK >= 0) & (routing.expert_TK < 4)).all()
    assert routing.weight_TK[2].isnan().all()
    for t in (0, 1, 3, 5):
        assert torch.equal(routing.expert_TK[t], clean.expert_TK[t])
        torch.testing.assert_close(routing.weight_TK[t], clean.weight_TK[t])


def test_no_tokens_give_empty_choices():
    options = {"groups": GroupLimit(2, 1), "biased": True, "score": "sigmoid"}
    assert router(4, 2, **options)(torch.zeros(0, 16)).weight_TK.shape == (0, 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"score_func": "softmax_topk", "norm_topk_prob": False}, "set score_func to softmax"),
        ({"n_group": 3}, "does not divide the 8 experts"),
        ({"n_group": 4, "topk_group": 5}, "n_group is 4"),
        ({"n_group": 4, "top_k": 3}, "raise topk_group"),
        ({"router_noise": -1.0}, "greater than or equal to 0"),
        ({"bias_update_rate": -0.1}, "greater than or equal to 0"),
    ],
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        MoEConfig.model_validate({"n_experts": 8, "top_k": 2, "intermediate_size": 16} | changes)
