"""Groups, the update and the clip, against torch's plain loop and the formula."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from mmoe.optim.adamw import AdamWConfig, ClipConfig, clip_gradients, gradient_norm, parameter_groups


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.camera = nn.Embedding(7, 6)
        self.time = nn.Sequential(nn.Linear(4, 6))
        self.norm = nn.RMSNorm(6)
        self.layer = nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight  # tied
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradients(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def test_norms_biases_and_scalar_embeddings_do_not_decay() -> None:
    decayed, others = parameter_groups(trainable(Model()), 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert [name for name, _ in decayed["params"]] == ["experts", "tokens.weight", "layer.weight"]
    assert {name for name, _ in others["params"]} == {
        "camera.weight",
        "time.0.weight",
        "time.0.bias",
        "norm.weight",
        "layer.bias",
        "gain",
    }


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Model()
    grouped = [id(p) for group in parameter_groups(trainable(model), 0.1) for _, p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_of_the_real_model_only_camera_and_time_matrices_do_not_decay() -> None:
    config = ModelConfig(
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        intermediate_size=16,
        moe=MoEConfig(n_experts=2, top_k=1, intermediate_size=16),
    )
    model = config.build(ModelInputs(50, patch_dim=8, state_dim=3, action_chunk=2, action_dim=2), seed=0)
    _, others = parameter_groups(trainable(model), 0.1)
    matrices = {name for name, parameter in others["params"] if parameter.ndim > 1}
    assert matrices == {"embeddings.camera.weight", "embeddings.time.hidden.weight", "embeddings.time.output.weight"}


def test_a_group_without_parameters_is_left_out() -> None:
    assert len(parameter_groups(trainable(nn.RMSNorm(4)), 0.1)) == 1


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_is_the_formula(implementation: str, dtype: torch.dtype) -> None:
    """Decoupled decay, bias-corrected moments: three steps written out for one decayed and one other parameter."""
    model, config = Model(dtype), AdamWConfig(implementation=implementation)
    optimizer = config.build(trainable(model))
    names = ("layer.weight", "norm.weight")
    before = {name: model.get_parameter(name).detach().double().clone() for name in names}
    moments = dict.fromkeys(names, (0.0, 0.0))
    for step in range(1, 4):
        with_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step
        for name in names:
            gradient, decay = model.get_parameter(name).grad.double(), 0.1 if name == "layer.weight" else 0.0
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.95 * moments[name][1] + 0.05 * gradient**2
            moments[name] = m, v
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - 0.01 * step * decay) - 0.01 * step * update
        optimizer.step()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for name in names:
        torch.testing.assert_close(
            model.get_parameter(name).detach().double(), before[name], rtol=tolerance, atol=tolerance
        )
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert all(value.dtype == dtype for value in states)


def test_a_new_optimizer_moves_nothing_until_a_rate_is_set() -> None:
    model = with_gradients(Model(), 1)
    before = [p.detach().clone() for p in model.parameters()]
    AdamWConfig().build(trainable(model)).step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def clip(parameters: list[nn.Parameter], config: ClipConfig) -> torch.Tensor:
    """The norm before."""
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
    clip_gradients(parameters, norm, config)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.5, 3.0, 1000.0])
def test_the_clip_is_torch_s(dtype: torch.dtype, bound: float) -> None:
    ours, peer = with_gradients(Model(dtype), 3), with_gradients(Model(dtype), 3)
    norm = clip(list(ours.parameters()), ClipConfig(max_norm=bound))
    expected = torch.nn.utils.clip_grad_norm_(peer.parameters(), bound)
    assert norm.dtype == torch.float64 and norm.ndim == 0
    torch.testing.assert_close(norm, expected.double(), rtol=1e-6, atol=0)
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        if a.grad is not None:
            # torch adds 1e-6 to the norm before it divides
            torch.testing.assert_close(a.grad, b.grad, rtol=3e-6, atol=1e-8)


def gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values), dtype=torch.float64))
    parameter.grad = torch.tensor(values, dtype=torch.float64)
    return parameter


def test_a_norm_at_the_bound_is_left_alone_bit_for_bit() -> None:
    """Recipes, section 7: [4, 3] has norm 5, so a clip at 5 does not touch it."""
    parameter = gradient(4.0, 3.0)
    assert clip([parameter], ClipConfig(max_norm=5.0)) == 5.0
    assert parameter.grad.tolist() == [4.0, 3.0]
    assert clip([parameter], ClipConfig(max_norm=2.5)) == 5.0
    assert parameter.grad.tolist() == [2.0, 1.5]


def test_without_a_bound_the_norm_is_measured_only() -> None:
    parameter = gradient(300.0, 400.0)
    assert clip([parameter], ClipConfig(max_norm=None)) == 500.0
    assert parameter.grad.tolist() == [300.0, 400.0]


def test_zero_missing_and_broken_gradients() -> None:
    zero = gradient(0.0, 0.0)
    assert clip([zero, nn.Parameter(torch.zeros(2))], ClipConfig()) == 0.0
    assert zero.grad.tolist() == [0.0, 0.0]
    assert not clip([gradient(float("nan"), 1.0)], ClipConfig()).isfinite()
    assert not clip([gradient(float("inf"), 1.0)], ClipConfig()).isfinite()


@pytest.mark.parametrize("wrong", [{"betas": (0.9, 1.0)}, {"eps": 0.0}, {"implementation": "loop"}])
def test_impossible_configs_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        AdamWConfig(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e20, 1e38])
def test_huge_finite_gradients_have_a_finite_norm_and_are_clipped_to_the_bound(dtype: torch.dtype, size: float) -> None:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((40, 50), (1000,))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, size)
    norm = clip(parameters, ClipConfig(max_norm=1.0))
    assert float(norm) == pytest.approx(size * 3000**0.5, rel=0.01)
    left = gradient_norm([p.grad for p in parameters])
    assert float(left) == pytest.approx(1, rel=0.02 if dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite_have_no_finite_norm(bad: float) -> None:
    gradients = [torch.ones(3), torch.tensor([1.0, bad])]
    assert not gradient_norm(gradients).isfinite()
    assert gradient_norm([]) == 0
