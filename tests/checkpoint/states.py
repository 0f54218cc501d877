"""Small states to save, and a disk that fails or a machine that stops at a chosen change."""

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manager import CheckpointManager
from mmoe.checkpoint.manifest import Manifest


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


def names(checkpoints: CheckpointManager) -> set[str]:
    return {path.name.removeprefix("step-000000") for path in checkpoints.folder.iterdir()}


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


def sealed(folder: Path) -> None:
    """Give the manifest the checksums that the files have now, as whoever made them would."""
    manifest = Manifest.read(folder)
    files = {name: (len(c := (folder / name).read_bytes()), zlib.crc32(c)) for name in manifest.files}
    (folder / "manifest.json").write_text(replace(manifest, files=files).to_json())
