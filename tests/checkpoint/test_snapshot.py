"""A snapshot says whether it shares memory with the live state, and is written as it was taken."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe.checkpoint.commit import PARTIAL, commit, path_of
from mmoe.checkpoint.snapshot import Snapshot
from mmoe.checkpoint.writer import write
from mmoe.runtime.agreement import ProcessGroupRanks
from tests.checkpoint.states import loaded, manager, state_of


def copied(snapshot: Snapshot) -> Snapshot:
    """As a manager makes it that writes beside the training."""
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    return replace(snapshot, tensors=tensors, owner=None)


def written(snapshot: Snapshot, folder: Path) -> Path:
    partial = path_of(folder, snapshot.step, PARTIAL)
    folder.mkdir(exist_ok=True)
    write(partial, snapshot, snapshot.gather(ProcessGroupRanks()).documents, ProcessGroupRanks())
    commit(partial)
    return path_of(folder, snapshot.step)


def elsewhere(act: Callable[[], Any]) -> list[BaseException]:
    """What `act` raises on a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_a_snapshot_shares_the_tensors_and_nothing_else_until_they_are_copied() -> None:
    state = {"model": {"weight": torch.zeros(3)}, "trainer": {"seen": [1, {"a": (2, None)}]}}
    texts = {"config.yaml": "a: 1"}
    live = Snapshot.take(10, state, texts)
    copy = copied(live)
    assert live.shares_memory and not copy.shares_memory
    assert live.tensors["model.weight"].data_ptr() == state["model"]["weight"].data_ptr()

    state["model"]["weight"].fill_(7.0)
    state["trainer"]["seen"][1]["a"] = "changed"
    state["trainer"]["seen"].append(3)
    texts["config.yaml"] = "a: 2"
    assert torch.equal(live.tensors["model.weight"], torch.full((3,), 7.0))
    assert torch.equal(copy.tensors["model.weight"], torch.zeros(3))
    assert live.document["trainer"] == {"seen": [1, {"a": {"$tuple": [2, None]}}]}
    assert live.texts == {"config.yaml": "a: 1"}


def test_copies_are_written_by_another_thread_with_the_values_of_their_step(tmp_path: Path) -> None:
    checkpoints, state = manager(tmp_path), state_of(1.0)
    snapshot = copied(Snapshot.take(10, state, {"config.yaml": "a: 1"}))
    state["model"]["weight"].fill_(2.0)
    state["trainer"]["value"] = 2.0
    assert elsewhere(lambda: written(snapshot, checkpoints.folder)) == []
    assert loaded(checkpoints) == 1.0 and checkpoints.text("config.yaml")[1] == "a: 1"


def test_no_other_thread_writes_what_the_training_may_change(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    snapshot = Snapshot.take(10, state_of(1.0), {})
    (error,) = elsewhere(lambda: written(snapshot, checkpoints.folder))
    assert isinstance(error, RuntimeError) and "copy them before" in str(error)
    assert checkpoints.steps() == []
    written(snapshot, checkpoints.folder)  # its own thread does
    assert loaded(checkpoints) == 1.0


def test_a_snapshot_is_written_as_a_manager_saves(tmp_path: Path) -> None:
    """Byte for byte, but for torch's name of the writing in `.metadata`, and its checksum."""
    texts = {"config.yaml": "a: 1"}
    ours = manager(tmp_path / "ours").save(10, state_of(1.0), texts)
    theirs = written(Snapshot.take(10, state_of(1.0), texts), tmp_path / "theirs")
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for name in ("__0_0.distcp", "state.json", "config.yaml"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="trainer.value is a set"):
        Snapshot.take(10, {"trainer": {"value": {1}}}, {})
