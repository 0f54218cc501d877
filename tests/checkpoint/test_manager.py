"""Checkpoints: exact, whole or absent, and never the reason that an older one is lost."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmoe.checkpoint.manager import CheckpointConfig, CheckpointManager
from mmoe.checkpoint.rng import capture_rng, restore_rng
from mmoe.errors import CheckpointError


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """When files are synced is tested; that a sync reaches the disk is the kernel's promise, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def manager(folder: Path, keep: int = 3) -> CheckpointManager:
    return CheckpointManager(folder / "checkpoints", CheckpointConfig(every_steps=10, keep=keep))


def state_of(value: float, size: int = 5) -> dict[str, Any]:
    return {"model": {"weight": torch.full((size,), float(value))}, "trainer": {"value": value}}


def loaded(checkpoints: CheckpointManager, step: int | None = None, size: int = 5) -> float:
    """The value of a `state_of` that was saved, after checking that all of it came back."""
    state = state_of(-1.0, size)
    checkpoints.load(state, step)
    value = state["trainer"]["value"]
    assert torch.equal(state["model"]["weight"], torch.full((size,), float(value)))
    return value


class Training:
    """A tied, normalised, noisy little model under AdamW: whatever is not restored shows in the next loss."""

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
    assert names == {"latest", "step-00000010", "step-00000050"}


def test_going_back_keeps_the_new_course(tmp_path: Path) -> None:
    """A run that went back to step 10 writes 15 and 20 anew; the abandoned 30 goes first."""
    checkpoints = manager(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step))
    checkpoints.save(15, state_of(15.5))
    assert checkpoints.latest_step() == 15 and checkpoints.steps() == [15, 30]
    checkpoints.save(20, state_of(20.5))
    assert checkpoints.steps() == [15, 20] and loaded(checkpoints) == 20.5


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    checkpoints.save(10, state_of(2.0))
    assert checkpoints.steps() == [10] and loaded(checkpoints) == 2.0
    assert {path.name for path in checkpoints.folder.iterdir()} == {"latest", "step-00000010"}


# ---------------------------------------------------------------------------- failures


class Crash(BaseException):
    """The machine stops here: nothing after it runs, not even the clean-up."""


def faults(monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[], BaseException], crash: bool) -> list[str]:
    """Make the `at`-th change to the disk raise `error`; returns the log of changes. After a crash all fail."""
    log: list[str] = []

    def guard(name: str, change: Callable) -> Callable:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            if len(log) - 1 == at or (crash and len(log) - 1 > at):
                raise error()
            return change(*args, **kwargs)

        return guarded

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (os, "write"),
    ):
        monkeypatch.setattr(owner, name, guard(name, getattr(owner, name)))
    return log


def edges(log: list[str]) -> list[int]:
    """The first and the last of every run of equal changes: nothing can differ between them."""
    return [i for i, name in enumerate(log) if i == 0 or i == len(log) - 1 or {log[i - 1], log[i + 1]} != {name}]


@pytest.mark.parametrize("again", [10, 20])
def test_a_crash_at_any_change_to_the_disk_loses_nothing(tmp_path: Path, again: int) -> None:
    """Whatever the moment: `latest` loads the old checkpoint whole or the new one whole, and saving goes on."""

    def save_over(folder: Path, at: int) -> list[str]:
        checkpoints = manager(folder, keep=1)
        checkpoints.save(10, state_of(1.0))
        with pytest.MonkeyPatch.context() as patch:
            log = faults(patch, at, Crash, crash=True)
            try:
                checkpoints.save(again, state_of(2.0))
            except Crash:
                assert len(log) > at
        return log

    log, outcomes = save_over(tmp_path / "whole", 10**6), []
    assert {"fsync", "rename", "replace", "write", "mkdir", "rmtree"} == set(log)
    for at in edges(log):
        folder = tmp_path / str(at)
        save_over(folder, at)
        after = manager(folder)
        found, latest = loaded(after), after.latest_step()
        outcomes.append(found)
        after.save(30, state_of(3.0))
        assert loaded(after) == 3.0 and loaded(after, latest) == found
        assert all(p.name == "latest" or p.name[5:].isdecimal() for p in after.folder.iterdir())
    assert outcomes == sorted(outcomes) and set(outcomes) == {1.0, 2.0}


def test_a_crash_half_way_through_a_deletion_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(tmp_path, keep=1)
    checkpoints.save(10, state_of(1.0))

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "manifest.json").unlink()
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shutil, "rmtree", rmtree)
        checkpoints.save(20, state_of(2.0))
    assert checkpoints.steps() == [20] and loaded(checkpoints) == 2.0


def test_a_full_disk_at_any_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints, refused = manager(tmp_path), 0
    checkpoints.save(10, state_of(1.0))
    for at in range(200):  # until none of the changes is the `at`-th
        with pytest.MonkeyPatch.context() as patch:
            log = faults(patch, at, full, crash=False)
            try:
                checkpoints.save(20, state_of(2.0))
                break
            except CheckpointError as error:
                assert "no room for a checkpoint of" in str(error) and "checkpoint.keep" in str(error)
        if log[at] == "write":
            refused += 1
            assert {p.name for p in checkpoints.folder.iterdir()} == {"latest", "step-00000010"}
            assert loaded(checkpoints) == 1.0
        assert loaded(checkpoints) in (1.0, 2.0)
    assert refused == log.count("write") > 10


def test_a_file_size_limit_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a tensor, where torch would speak of file positions."""
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0, 100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            checkpoints.save(20, state_of(2.0, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "earlier checkpoints are intact" in str(error.value)
    assert {p.name for p in checkpoints.folder.iterdir()} == {"latest", "step-00000010"}
    assert loaded(checkpoints, size=100_000) == 1.0


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(20, state_of(2.0, 1_000_000))
    assert f"{checkpoints.folder}: no room for a checkpoint of 5,048,576 bytes (1,234 free)" in str(error.value)
    assert {p.name for p in checkpoints.folder.iterdir()} == {"latest", "step-00000010"}


def test_ctrl_c_while_saving_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    with monkeypatch.context() as patch:
        faults(patch, 5, KeyboardInterrupt, crash=False)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(20, state_of(2.0))
    assert {p.name for p in checkpoints.folder.iterdir()} == {"latest", "step-00000010"}
    assert loaded(checkpoints) == 1.0


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="saving a checkpoint of .* failed .*File exists"):
        manager(tmp_path).save(10, state_of(1.0))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "gone"])
def test_a_broken_checkpoint_is_named_by_file(tmp_path: Path, name: str, fault: str) -> None:
    checkpoints = manager(tmp_path)
    path = checkpoints.save(10, state_of(1.0)) / name
    content = path.read_bytes()
    if fault == "gone":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b"{") if name == "manifest.json" else len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x11]) + content[middle + 1 :])
    with pytest.raises(CheckpointError, match=f"{name}.*resume from an"):
        loaded(checkpoints)


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
    with pytest.raises(CheckpointError, match="no checkpoint of step 20; choose from 10"):
        loaded(checkpoints, 20)
    (checkpoints.folder / "latest").write_text("step-00000099\n")
    with pytest.raises(CheckpointError, match="names 'step-00000099', which is not there"):
        loaded(checkpoints)
    manifest = checkpoints.folder / "step-00000010/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match="has format 3, this mmoe reads 1 to 2"):
        loaded(checkpoints, 10)


def test_saving_and_loading_warn_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    manager(tmp_path).save(10, state_of(1.0))
    loaded(manager(tmp_path))
    assert [str(warning.message) for warning in recwarn] == []


def test_due() -> None:
    config = CheckpointConfig(every_steps=10, keep=1)
    assert [step for step in range(1, 36) if config.due(step, 35)] == [10, 20, 30, 35]
    with pytest.raises(ValidationError):
        CheckpointConfig(keep=0)
