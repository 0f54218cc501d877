"""Muon for the matrices of the blocks beside AdamW: disjoint, complete, and each the optimizer it claims to be."""

import copy

import pytest
import torch

from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from mmoe.optim.adamw import AdamWConfig, build_adamw
from mmoe.optim.muon import MuonConfig, build_optimizer


@pytest.fixture
def model():
    moe = MoEConfig(experts=4, top_k=2, hidden=16, every=2)
    config = ModelConfig(d_model=16, layers=2, heads=2, kv_heads=1, hidden=32, moe=moe)
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
    joint, plain = build_optimizer(model, AdamWConfig(), None), build_adamw(twin, AdamWConfig())
    for optimizer, owner in ((joint, model), (plain, twin)):
        fill(owner)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_states_travel_by_name_of_their_optimizer(model):
    optimizer = build_optimizer(model, AdamWConfig(), MuonConfig())
    fill(model)
    optimizer.step()
    other = build_optimizer(model, AdamWConfig(), MuonConfig())
    other.load_state_dict(optimizer.state_dict())
    assert other.state.keys() == optimizer.state.keys()
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(other.state[parameter][key]), torch.as_tensor(value))
