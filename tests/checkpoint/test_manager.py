"""Checkpoints: exact, whole or absent, and never the reason that an older one is lost."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.rng import capture_rng, restore_rng
from mmoe.errors import CheckpointError, ConfigError
from tests.checkpoint.states import loaded, manager, names, state_of


class Training:
    """A tied, normalized, noisy little model under AdamW: whatever is not restored shows in the next loss."""

    def __init__(self, seed: int, dtype: torch.dtype, fused: bool):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 6)).to(dtype)
        self.model[3].weight = nn.Parameter(self.model[3].weight.detach())
        self.model[0].weight = nn.Parameter(self.model[0].weight.detach())
        self.model.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.01, betas=(0.9, 0.95), fused=fused)

    def step(self) -> float:
        x = torch.randn(4, 6).to(self.model[0].weight.dtype)
        loss = (self.model(x) - x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.count += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": capture_rng()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, fused: bool
) -> None:
    whole = Training(1, dtype, fused)
    for _ in range(4):
        whole.step()
    manager(tmp_path).save(4, whole.state())
    expected = [whole.step() for _ in range(5)]

    resumed = Training(2, dtype, fused)
    state = resumed.state()
    assert manager(tmp_path).load(state) == 4
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    restore_rng(state["rng"])
    assert [resumed.step() for _ in range(5)] == expected
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    ours, theirs = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, tensors in ours["state"].items():
        for name, tensor in tensors.items():
            other = theirs["state"][number][name]
            assert torch.equal(tensor, other) and tensor.dtype == other.dtype


def test_tensors_are_filled_in_place_and_sections_can_be_chosen(tmp_path: Path) -> None:
    training = Training(1, torch.float32, True)
    training.step()
    manager(tmp_path).save(1, training.state())
    other = Training(2, torch.float32, True)
    state = {"model": other.model.state_dict()}
    manager(tmp_path).load(state)
    assert set(state) == {"model"}
    for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    wide = torch.arange(1000.0)
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "half": torch.tensor([1.5, -0.0]).bfloat16(),
        "special": torch.tensor([float("nan"), float("inf"), 1e-45]),
        "view": wide[3:7],
        "columns": wide.view(10, 100).T,
        "bool": torch.tensor([True, False]),
    }
    saved = manager(tmp_path).save(1, {"x": tensors})
    state: dict[str, Any] = {"x": {}}
    manager(tmp_path).load(state)
    for name, tensor in tensors.items():
        back = state["x"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert torch.equal(back.nan_to_num(7.0), tensor.nan_to_num(7.0)) and torch.equal(back.isnan(), tensor.isnan())
    assert (saved / "__0_0.distcp").stat().st_size < 40_000  # the storage behind a view is not written


def test_latest_and_retention(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    assert checkpoints.latest_step() is None and checkpoints.steps() == []
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step))
        assert checkpoints.latest_step() == step
    assert checkpoints.steps() == [20, 30]
    assert loaded(checkpoints) == 30 and loaded(checkpoints, 20) == 20


def test_retention_counts_only_what_is_committed(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    checkpoints.save(10, state_of(10))
    for step in (20, 30, 40):  # left by crashes
        shutil.copytree(tmp_path / "checkpoints/step-00000010", tmp_path / f"checkpoints/step-{step:08d}.partial")
    assert checkpoints.steps() == [10] and checkpoints.latest_step() == 10
    checkpoints.save(50, state_of(50))
    assert checkpoints.steps() == [10, 50]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000010", "step-00000050"}


def test_the_newest_is_found_by_itself_whatever_a_pointer_says(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state_of(step))
    for text in ("step-00000010\n", "step-00000099\n", "", "\0"):  # as format 2 had it, lost or damaged
        (checkpoints.folder / "latest").write_text(text)
        assert checkpoints.latest_step() == 20 and loaded(checkpoints) == 20
    checkpoints.save(30, state_of(30))
    assert names(checkpoints) == {"10", "20", "30"}


def test_retention_keeps_the_newest_by_step_and_what_was_just_saved(tmp_path: Path) -> None:
    """A run that begins anew beside good checkpoints (its folder's names were lost to it) deletes none of them."""
    checkpoints = manager(tmp_path, keep=2)
    for step in (80, 90):
        checkpoints.save(step, state_of(step))
    checkpoints.save(10, state_of(10.5))
    assert checkpoints.steps() == [10, 80, 90] and loaded(checkpoints) == 90 and loaded(checkpoints, 10) == 10.5


def test_going_back_is_recorded_and_keeps_the_new_course(tmp_path: Path) -> None:
    """A run that went back to step 10 writes 15 and 20 anew; what it left goes first, the oldest of that before."""
    checkpoints = manager(tmp_path, keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step))
    checkpoints.go_back(10)
    assert names(checkpoints) == {"10", "20.left", "30.left"}
    assert checkpoints.latest_step() == 10 and loaded(checkpoints) == 10  # killed before it saved anything
    checkpoints.save(15, state_of(15.5))
    assert names(checkpoints) == {"10", "15", "30.left"}
    with pytest.raises(ConfigError, match=r"no checkpoint of step 30; choose from 10, 15; the run had left .*\.left"):
        loaded(checkpoints, 30)
    checkpoints.save(20, state_of(20.5))
    checkpoints.go_back(15)
    checkpoints.save(20, state_of(20.75))
    checkpoints.go_back(15)  # twice from the same step
    assert names(checkpoints) == {"10", "15", "20.left"} and loaded(checkpoints) == 15.5


def test_checkpoints_that_were_all_left_are_no_start_at_step_0(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state_of(step))
    checkpoints.go_back(10)
    shutil.rmtree(checkpoints.folder / "step-00000010")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint but step-00000020\.left.*--fresh"):
        checkpoints.latest_step()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    checkpoints.save(10, state_of(2.0))
    assert checkpoints.steps() == [10] and loaded(checkpoints) == 2.0
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-00000010"}


def test_another_model_is_named_by_tensor(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    for weights, sentence in (
        (
            {"weight": torch.zeros(6)},
            r"model.weight was saved as torch.float32 \[5\], this run has torch.float32 \[6\]",
        ),
        ({"weight": torch.zeros(5).double()}, "this run has torch.float64"),
        ({"weight": torch.zeros(5), "bias": torch.zeros(5)}, r"model.bias is not in the checkpoint \(1 names differ\)"),
        ({"bias": torch.zeros(5)}, "model.bias is not in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            checkpoints.load({"model": weights})
    with pytest.raises(CheckpointError, match="no 'optimizer'"):
        checkpoints.load({"optimizer": {}})


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint; train the run first"):
        loaded(checkpoints)
    checkpoints.save(10, state_of(1.0))
    with pytest.raises(ConfigError, match="no checkpoint of step 20; choose from 10"):
        loaded(checkpoints, 20)
    manifest = checkpoints.folder / "step-00000010/manifest.json"
    manifest.write_text(replace(Manifest.read(manifest.parent), format=9).to_json())
    for step in (None, 10):  # nothing is wrong with it, so an older one is no answer
        with pytest.raises(CheckpointError, match="has format 9, this mmoe reads 1 to 4"):
            loaded(checkpoints, step)


def test_saving_and_loading_warn_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    manager(tmp_path).save(10, state_of(1.0))
    loaded(manager(tmp_path))
    assert [str(warning.message) for warning in recwarn] == []


def test_due() -> None:
    config = CheckpointConfig(every_steps=10, keep=1)
    assert [step for step in range(1, 36) if config.due(step, 35)] == [10, 20, 30, 35]
    with pytest.raises(ValidationError):
        CheckpointConfig(keep=0)
