"""The layer against a loop over tokens written here, in all modes; its engines against each other; its edges."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from mmoe import optional
from mmoe.errors import PackageError
from mmoe.models.moe.experts import Experts
from mmoe.models.moe.layer import MoEConfig, MoELayer
from mmoe.models.moe.tokens import Tokens
from tests.models.random_batch import random_batch

D = 8
MODES = {
    "dropless": {},
    "padded": {"token_group_alignment": 16},
    "capacity": {"capacity_factor": 2.0},  # E / K: nothing overflows
    "position": {"capacity_factor": 2.0, "drop_policy": "position"},
    "capacity, padded": {"capacity_factor": 2.0, "token_group_alignment": 16},
}


def build(dtype=torch.float64, **changes) -> MoELayer:
    shape = {
        "n_experts": 4,
        "top_k": 2,
        "intermediate_size": 16,
        "expert_backend": "loop",
        "n_shared_experts": 1,
        "shared_gate": True,
    }
    layer = MoELayer(D, MoEConfig(**shape | changes))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype)


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + torch.exp(-g)) * (x @ up)) @ down


def by_token(layer: MoELayer, x_BLD: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """One token at a time, one expert at a time."""
    experts, shared = layer.experts, layer.shared
    rows = []
    for x, real in zip(x_BLD.flatten(0, 1), valid.flatten().tolist()):
        out = x * 0
        if real:
            scores = torch.softmax(layer.router.weight @ x, 0)
            chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: layer.router.top_k]
            total = sum(scores[e] for e in chosen)
            for e in chosen:
                out = out + scores[e] / total * swiglu(x, experts.gate[e], experts.up[e], experts.down[e])
            own = swiglu(x, shared.gate.weight.T, shared.up.weight.T, shared.down.weight.T)
            out = out + own / (1 + torch.exp(-layer.shared_gate.weight[0] @ x))
        rows.append(out)
    return torch.stack(rows).view_as(x_BLD)


def results(layer: MoELayer, run) -> list[torch.Tensor]:
    batch = random_batch(0)
    torch.manual_seed(1)
    x = torch.randn(*batch.shape, D, dtype=layer.experts.up.dtype, requires_grad=True)
    out = run(x, batch)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(a, b, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("mode", MODES)
def test_values_and_every_gradient_equal_a_loop_over_tokens_in_float64(mode):
    layer = build(**MODES[mode])
    ours = results(layer, lambda x, batch, layer=layer: layer(x, Tokens.from_batch(batch))[0])
    close(ours, results(layer, lambda x, batch: by_token(layer, x, batch.valid)), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "engine, dtype, tolerance", [("loop", torch.float64, 1e-12), ("grouped_mm", torch.float32, 1e-5)]
)
def test_modes_agree_where_nothing_overflows(mode, engine, dtype, tolerance):
    layers = [build(dtype, expert_backend=engine, **changes) for changes in ({}, MODES[mode])]
    close(
        *(results(layer, lambda x, batch, layer=layer: layer(x, Tokens.from_batch(batch))[0]) for layer in layers),
        tolerance,
    )


def test_values_of_the_modes_agree_to_1e_6_in_float32():
    layers = [build(torch.float32, **changes) for changes in MODES.values()]
    outs = [results(layer, lambda x, batch, layer=layer: layer(x, Tokens.from_batch(batch))[0])[0] for layer in layers]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_grouped_mm_equals_the_loop(dtype, tolerance):
    sizes = torch.tensor([30, 0, 7, 16])
    found = []
    for engine in ("grouped_mm", "loop"):
        experts = Experts(4, 16, 24, engine)
        torch.manual_seed(0)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        experts = experts.to(dtype)
        x = torch.randn(53, 16).to(dtype).requires_grad_()
        out = experts(x, sizes.cumsum(0).int())
        weights = torch.randn(out.shape).to(dtype)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [x, *experts.parameters()])])
    close(*found, tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    layer, batch = build(intermediate_size=3, **MODES[mode]), random_batch(0)
    at = batch.valid[:1].nonzero()[:4, 1]
    names = ("token_ids", "document", "modality", "source")
    tokens = Tokens.from_batch(replace(batch, **{name: getattr(batch, name)[:1, at] for name in names}))
    torch.manual_seed(3)
    x = torch.randn(1, len(at), D, dtype=torch.float64, requires_grad=True)
    scores = layer.router(x[0]).scores_TE.sort(1, descending=True).values
    assert (scores[:, 1] - scores[:, 2]).min() > 1e-3  # away from top-k ties
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x, tokens))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("engine", ["loop", "grouped_mm"])
@pytest.mark.parametrize("shape", [{"n_experts": 1, "top_k": 1}, {"n_experts": 4, "top_k": 4}, {}], ids=str)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_no_token_and_one_token(engine, shape, count, mode):
    batch = random_batch(0)
    document = torch.full_like(batch.document, -1)
    document[0, :count] = 0
    batch = replace(batch, document=document)
    layer = build(torch.float32, expert_backend=engine, **shape | MODES[mode])
    x = torch.randn(*batch.shape, D, requires_grad=True)
    out, routed = layer(x, Tokens.from_batch(batch))
    torch.testing.assert_close(out, by_token(layer, x, batch.valid), rtol=1e-4, atol=1e-5)
    (out.sum() + routed.balance_loss + routed.z_loss).backward()  # an expanded gradient, too
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert count or not parameter.grad.any(), name


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"drop_policy": "position"}, "without a capacity_factor"),
        ({"n_shared_experts": 0}, "no n_shared_experts to gate"),
        ({"expert_backend": "transformer_engine", "intermediate_size": 12}, "transformer_engine needs a multiple of 8"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        build(**changes)


OPTIONAL = [("megablocks", "megablocks"), ("transformer_engine", "transformer-engine")]


@pytest.mark.parametrize("engine, backend", OPTIONAL)
def test_an_engine_that_is_not_there_stops_at_start(engine, backend):
    if optional.status(backend).available:
        pytest.skip(f"{backend} is installed here")
    with pytest.raises(PackageError, match=f"model.moe.expert_backend asks for {backend}, not available because"):
        build(expert_backend=engine)


@pytest.mark.gpu
@pytest.mark.parametrize("engine, backend", OPTIONAL)
def test_contract_of_the_optional_engines(engine, backend):
    """They multiply as the loop does, forwards and backwards, with an expert without a row."""
    if not optional.status(backend).available:
        pytest.skip(optional.status(backend).reason)
    sizes = torch.tensor([32, 0, 16, 48], device="cuda")
    found = []
    for name in (engine, "loop"):
        experts = Experts(4, 64, 128, name)
        torch.manual_seed(0)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        experts = experts.cuda().bfloat16()
        x = torch.randn(96, 64).cuda().bfloat16().requires_grad_()
        out = experts(x, sizes.cumsum(0).int())
        weights = torch.randn(96, 64).to(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [x, *experts.parameters()])])
    close(*found, 0.03)
