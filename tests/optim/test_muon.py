"""Muon for the matrices of the blocks beside AdamW: disjoint, complete, and each the optimizer it claims to be."""

import copy

import pytest
import torch

from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from mmoe.optim.adamw import AdamWConfig
from mmoe.optim.muon import MuonConfig
from mmoe.optim.optimizer import build_optimizer


@pytest.fixture
def model():
    moe = MoEConfig(n_experts=4, top_k=2, intermediate_size=16, layer_freq=2)
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32, moe=moe)
    return config.build(ModelInputs(40, patch_dim=8, state_dim=3, action_chunk=2, action_dim=2), seed=0)


def fill(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_every_parameter_has_exactly_one_optimizer(model):
    optimizer = build_optimizer(model, AdamWConfig(), MuonConfig())
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == {id(p) for p in model.parameters()}


def test_muon_gets_the_matrices_of_the_blocks_alone(model):
    names = {id(p): name for name, p in model.named_parameters()}
    muon = build_optimizer(model, AdamWConfig(), MuonConfig()).parts["muon"]
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "decoder.blocks.0.attention.query.weight" in taken
    assert not any("embeddings" in n or "norm" in n or "router" in n or "action" in n for n in taken)
    assert all(model.get_parameter(name).ndim == 2 for name in taken)


def test_an_update_is_orthogonal_and_as_large_as_adamws(model):
    """Singular values of the step lie near one another, and its root mean square near 0.2 lr."""
    optimizer = build_optimizer(model, AdamWConfig(weight_decay=0), MuonConfig(weight_decay=0))
    fill(model)
    weight = model.decoder.blocks[0].attention.query.weight
    before = weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    step = (before - weight.detach()).double()
    values = torch.linalg.svdvals(step)
    assert values.max() / values.min() < 2.5
    assert step.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.3)


def test_without_muon_it_is_adamw(model):
    twin = copy.deepcopy(model)
    joint, plain = build_optimizer(model, AdamWConfig()), AdamWConfig().build(dict(twin.named_parameters()))
    for optimizer, owner in ((joint, model), (plain, twin)):
        fill(owner)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_states_travel_by_the_names_of_their_parameters(model):
    """Neither the order of the parameters nor which of them a stage holds matters."""
    optimizer = build_optimizer(model, AdamWConfig(), MuonConfig())
    fill(model)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved.keys() == {name for name, _ in model.named_parameters()}
    stage = copy.deepcopy(model)
    stage.decoder.blocks = torch.nn.ModuleDict({"1": stage.decoder.blocks[1]})
    part = build_optimizer(stage, AdamWConfig(), MuonConfig())
    part.load_state_dict(dict(reversed(saved.items())))
    assert 0 < len(part.state_dict()) < len(saved)
    for name, state in part.state_dict().items():
        assert state.keys() == saved[name].keys()
        assert all(torch.equal(state[key], value) for key, value in saved[name].items()), name
    with pytest.raises(KeyError, match="decoder.blocks.0"):
        build_optimizer(model, AdamWConfig(), MuonConfig()).load_state_dict(part.state_dict())


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_states_that_are_there_from_the_start_are_those_of_torch(model, implementation):
    """Bit for bit, for matrices of any shape, for a parameter whose first gradient comes later, and after loading."""
    adamw, muon = AdamWConfig(implementation=implementation), MuonConfig()
    twin = copy.deepcopy(model)
    ours = build_optimizer(model, adamw, muon)
    matrices = {name: twin.get_parameter(name) for name in ours.parts["muon"].param_groups[0]["param_names"]}
    plain = [
        adamw.build({name: p for name, p in twin.named_parameters() if name not in matrices}),
        torch.optim.Muon(
            matrices.values(), momentum=muon.momentum, weight_decay=muon.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    for number in range(3):
        for owner in (model, twin):
            fill(owner)
            if number == 0:
                owner.embeddings.camera.weight.grad = None
                owner.decoder.blocks[0].attention.query.weight.grad = None
        for group in [*ours.param_groups, *(group for part in plain for group in part.param_groups)]:
            group["lr"] = 1e-2 / (1 + number)
        if number == 2:
            resumed = build_optimizer(model, adamw, muon)
            resumed.load_state_dict(ours.state_dict())
            for group in resumed.param_groups:
                group["lr"] = 1e-2 / 3
            ours = resumed
        for optimizer in (ours, *plain):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    theirs = {p: state for part in plain for p, state in part.state.items()}
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.state[a].keys() == theirs[b].keys()
        assert all(torch.equal(ours.state[a][key], value) for key, value in theirs[b].items())
        assert all(ours.state[a][key].dtype == value.dtype for key, value in theirs[b].items())
