import torch

from mmoe.models.moe.router import Router


def router(experts: int, top_k: int, normalise: bool = True, scale: float = 1.0) -> Router:
    made = Router(16, experts, top_k, normalise, scale)
    torch.nn.init.normal_(made.weight)
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
        router(6, 3, normalise=False)(x).weight_TK.sort(descending=True).indices[:, 0], torch.zeros(50).long()
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
    made = router(4, 1, normalise=False)
    made(x).weight_TK.sum().backward()
    assert (made.weight.grad != 0).any()


def test_logits_are_float32_under_autocast():
    made = router(4, 2)
    x = torch.randn(30, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = made(x)
    assert torch.equal(routing.logits_TE, x.float() @ made.weight.T)
