"""A training that is saved under one layout and goes on under another: the next losses are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manager import CheckpointManager
from tests.distributed.pool import Pool
from tests.distributed.small import build, full, optimizer_of, train_step


def begin(layout: str, folder: Path, muon: bool) -> list[float]:
    """Three steps, a checkpoint, and the losses of two further steps."""
    model = build(layout)
    optimizer = optimizer_of(model, muon)
    for number in range(3):
        train_step(model, optimizer, number)
    manager = CheckpointManager(folder, CheckpointConfig())
    manager.save(3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return [train_step(model, optimizer, number) for number in (3, 4)]


def go_on(layout: str, folder: Path, muon: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of two steps after the checkpoint, and the optimizer's state when it was loaded."""
    model = build(layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    optimizer = optimizer_of(model, muon)
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert CheckpointManager(folder, CheckpointConfig()).load(state) == 3
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loaded = {
        f"{name}.{key}": full(value).clone()
        for name, states in optimizer.state_dict().items()
        for key, value in states.items()
    }
    return [train_step(model, optimizer, number) for number in (3, 4)], loaded


def run(function: Callable, world: str, two: Pool, four: Pool, *args: Any) -> Any:
    """What rank 0 of a world returns."""
    layout, _, size = world.partition(" on ")
    if size == "1":
        return function(layout, *args)
    return {"2": two, "4": four}[size].run(function, layout, *args)[0]


WORLDS = ["one on 1", "dp on 2", "dp on 4", "dp_tp on 4"]


@pytest.mark.parametrize("muon", [True, False], ids=["muon", "adamw"])
@pytest.mark.parametrize("saved", WORLDS)
def test_the_next_losses_do_not_depend_on_the_layout(
    two: Pool, four: Pool, tmp_path: Path, saved: str, muon: bool
) -> None:
    expected = run(begin, saved, two, four, tmp_path, muon)
    states = []
    for world in WORLDS:
        losses, state = run(go_on, world, two, four, tmp_path, muon)
        assert losses[0] == pytest.approx(expected[0], rel=1e-6, abs=0), world
        assert losses[1] == pytest.approx(expected[1], rel=1e-4, abs=0), world  # after a step of Muon, in bfloat16
        states.append(state)
    for state in states[1:]:  # bit for bit, the counts of steps and what never had a gradient included
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert states[0]["unused.step"] == 0 and states[0]["head.bias.step"] == 3
