"""Checkpoints of earlier formats: numbered optimizer states (1), and other names of parameters (1 to 3)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manager import CheckpointManager
from mmoe.checkpoint.manifest import _crc32
from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from mmoe.optim.adamw import AdamWConfig
from mmoe.optim.muon import MuonConfig
from mmoe.optim.optimizer import CompositeOptimizer, build_optimizer

WITHOUT_GRADIENT = "embeddings.camera.weight"


def model_of(seed: int) -> MultimodalModel:
    moe = MoEConfig(n_experts=4, top_k=2, intermediate_size=16, layer_freq=2, bias_update_rate=0.1)
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32, moe=moe)
    return config.build(ModelInputs(40, patch_dim=8, state_dim=3, action_chunk=2, action_dim=2), seed=seed)


def step(model: MultimodalModel, optimizer: CompositeOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name == WITHOUT_GRADIENT else gradient
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()


def format_1(optimizer: CompositeOptimizer) -> dict[str, Any]:
    """The optimizer's section as format 1 had it: torch's own, no names for Muon, no state without a gradient."""
    section = {}
    for name, part in optimizer.parts.items():
        state = part.state_dict()
        for group in state["param_groups"]:
            names = group.pop("param_names") if name == "muon" else group["param_names"]
            if WITHOUT_GRADIENT in names:
                del state["state"][group["params"][names.index(WITHOUT_GRADIENT)]]
        section[name] = state
    return section


def earlier(state: Any) -> Any:
    """The state with the names that parameters and buffers had before format 4, wherever it has them."""
    if isinstance(state, list):
        return [earlier(item) for item in state]
    if isinstance(state, str):
        return (
            state.replace("feed_forward.", "network.")
            .replace("ffn_norm", "network_norm")
            .replace("expert_bias", "choice_bias")
        )
    return {earlier(key): earlier(value) for key, value in state.items()} if isinstance(state, dict) else state


def declare(saved: Path, version: int) -> None:
    """Say that the checkpoint is of an earlier format."""
    path = saved / "manifest.json"
    content = json.loads(path.read_text()) | {"format": version}
    del content["crc32"]
    path.write_text(json.dumps(content | {"crc32": _crc32(content)} if version > 2 else content))


def tensors(optimizer: CompositeOptimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("muon", [MuonConfig(), None], ids=["muon", "adamw"])
def test_a_training_goes_on_from_format_1(tmp_path: Path, muon: MuonConfig | None) -> None:
    model, checkpoints = model_of(0), CheckpointManager(tmp_path, CheckpointConfig())
    optimizer = build_optimizer(model, AdamWConfig(), muon)
    for seed in range(2):
        step(model, optimizer, seed)
    saved = checkpoints.save(2, earlier({"model": model.state_dict(), "optimizer": format_1(optimizer)}))
    declare(saved, 1)

    other = model_of(1)
    resumed = build_optimizer(other, AdamWConfig(), muon)
    state = {"model": other.state_dict(), "optimizer": resumed.state_dict()}
    checkpoints.load(state)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert tensors(resumed).keys() == tensors(optimizer).keys()
    assert all(torch.equal(tensors(resumed)[name], value) for name, value in tensors(optimizer).items())
    step(model, optimizer, 2)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_alone_are_read_from_format_1(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig())
    saved = checkpoints.save(2, {"model": {"weight": torch.ones(3)}, "trainer": {"step": 2}})
    declare(saved, 1)
    state: dict[str, Any] = {"model": {"weight": torch.zeros(3)}}
    checkpoints.load(state)
    assert state["model"]["weight"].tolist() == [1, 1, 1]


def test_a_training_goes_on_from_format_3(tmp_path: Path) -> None:
    model, checkpoints = model_of(0), CheckpointManager(tmp_path, CheckpointConfig())
    optimizer = build_optimizer(model, AdamWConfig(), MuonConfig())
    step(model, optimizer, 0)
    plan = {"window": 3, "owed": [-2, 5]}
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trainer": {"step": 2, "stream": {"plan": plan, "quarantine": {}}},
        "callbacks": {"metrics": {"totals": {"tokens": 5.0, "expert_choices": 8.0}}},
    }
    names = set(model.state_dict())
    declare(checkpoints.save(2, earlier(state)), 3)
    assert sum(earlier(name) != name for name in names) == 10

    other = model_of(1)
    resumed = build_optimizer(other, AdamWConfig(), MuonConfig())
    found: dict[str, Any] = {
        "model": other.state_dict(),
        "optimizer": resumed.state_dict(),
        "trainer": {},
        "callbacks": {},
    }
    checkpoints.load(found)
    other.load_state_dict(found["model"])
    resumed.load_state_dict(found["optimizer"])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(tensors(resumed)[name], value) for name, value in tensors(optimizer).items())
    assert found["callbacks"]["metrics"]["totals"] == {"tokens": 5.0, "slots_routed": 8.0}
    assert found["trainer"]["stream"]["plan"] == {"window": 3, "deficit": [-2, 5]}


def test_modules_of_others_keep_their_names(tmp_path: Path) -> None:
    """Only our own were renamed: a head from outside may have a network too."""
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig())
    declare(checkpoints.save(2, {"model": {"heads.depth.network.weight": torch.ones(3)}}), 3)
    state: dict[str, Any] = {"model": {"heads.depth.network.weight": torch.zeros(3)}}
    checkpoints.load(state)
    assert state["model"]["heads.depth.network.weight"].tolist() == [1, 1, 1]
