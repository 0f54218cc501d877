"""Optimizers by kind: named in a config, built in or from outside, with the state that they say they have."""

import pytest
import torch
from torch import nn

from mmoe.config.load import validate
from mmoe.errors import ConfigError
from mmoe.optim.adamw import AdamWConfig
from mmoe.optim.config import OptimConfig
from mmoe.optim.muon import MuonConfig
from mmoe.optim.optimizer import OptimizerConfig, build_optimizer
from tests.optim.outside import SignsConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 4)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.frozen, self.decoder = nn.Linear(3, 2), nn.Parameter(torch.ones(2), False), Block()


def chosen(**keys: object) -> OptimConfig:
    return validate(OptimConfig, {"lr": {"peak": 1e-3}, **keys}, "test")


@pytest.mark.parametrize(
    "config",
    [AdamWConfig(), AdamWConfig(implementation="foreach"), MuonConfig(), SignsConfig()],
    ids=lambda config: config.kind,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_holds_after_a_step_what_it_lays_out_and_no_more(config: OptimizerConfig, dtype) -> None:
    """What planning counts and a checkpoint keeps is all there is."""
    model = nn.Linear(5, 3, bias=False, dtype=dtype)
    optimizer = build_optimizer(model, config)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in optimizer.state[model.weight].items()}
    assert found == {
        name: ((3, 5) if tensor.shape is None else tensor.shape, tensor.dtype or dtype)
        for name, tensor in config.state_layout((3, 5)).items()
    }
    assert optimizer.state_dict().keys() == {"weight"}


@pytest.mark.parametrize(
    "config", [AdamWConfig(), AdamWConfig(implementation="foreach"), MuonConfig()], ids=["fused", "foreach", "muon"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_what_is_built_in_is_laid_out_as_torch_makes_it(config: OptimizerConfig, dtype) -> None:
    weight = nn.Parameter(torch.ones(3, 5, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    built = config.build({"weight": weight})
    torch.optim.Muon.step(built) if isinstance(built, torch.optim.Muon) else built.step()
    theirs = {name: (tensor.shape, tensor.dtype) for name, tensor in built.state[weight].items()}
    laid_out = {name: tensor.zeros(weight) for name, tensor in config.state_layout((3, 5)).items()}
    assert theirs == {name: (tensor.shape, tensor.dtype) for name, tensor in laid_out.items()}


def test_the_matrices_of_the_blocks_have_the_optimizer_that_a_config_names_for_them() -> None:
    config = chosen(matrices={"kind": "tests.signs", "momentum": 0.5})
    optimizer = build_optimizer(Model(), config.optimizer, config.matrices)
    names = {label: {n for g in part.param_groups for n in g["param_names"]} for label, part in optimizer.parts.items()}
    assert names == {
        "adamw": {"head.weight", "head.bias", "decoder.blocks.0.bias"},
        "tests.signs": {"decoder.blocks.0.weight"},
    }
    assert optimizer.parts["tests.signs"].param_groups[0]["momentum"] == 0.5


def test_one_from_outside_takes_the_place_of_all() -> None:
    model, config = Model(), chosen(optimizer={"kind": "tests.signs"})
    optimizer = build_optimizer(model, config.optimizer, config.matrices)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -2.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + (0.25 if name != "frozen" else 0))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"optimizer": {"kind": "adam"}}, "optimizer: 'adam' is not a kind of optimizer; did you mean adamw"),
        ({"optimizer": {"kind": "adamw", "beta": 1}}, "optimizer: beta is not a known key; did you mean betas"),
        ({"matrices": {"momentum": 0.9}}, "matrices: give a mapping that says which optimizer it is"),
        ({"matrices": {"kind": "adamw"}}, "two are named adamw; give each a name of its own"),
    ],
)
def test_every_fault_of_a_choice_is_a_sentence(keys: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen(**keys)


def test_muon_takes_matrices_alone() -> None:
    with pytest.raises(ConfigError, match=r"optimizer muon would update .*bias, which is no matrix; .*optim.matrices"):
        build_optimizer(Model(), MuonConfig())


def test_an_optimizer_must_hold_what_it_is_given_by_name(monkeypatch) -> None:
    monkeypatch.setattr(SignsConfig, "named", False)
    with pytest.raises(ConfigError, match=r"tests.signs does not hold .* have SignsConfig.build give its groups"):
        build_optimizer(Model(), SignsConfig())
