"""Checkpoints of several processes: any layout loads what any other saved, and one rank's failure is everyone's."""

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manager import CheckpointManager
from mmoe.errors import CheckpointError
from tests.distributed.pool import Pool

SHAPES = {  # rows that no number of ranks divides, fewer rows than ranks, experts, none
    "embedding.weight": (7, 6),
    "blocks.0.matrix": (8, 6),
    "blocks.0.bias": (3,),
    "blocks.1.experts": (4, 4, 6),
    "blocks.1.half": (5, 2),
    "empty": (0, 3),
}
LAYOUTS = ["dp4", "hsdp", "dp_tp", "ep", "ep_shard", "replicated", "plain", "pp_dp", "one rank"]


def manager(folder: Path, keep: int = 3) -> CheckpointManager:
    return CheckpointManager(folder / "checkpoints", CheckpointConfig(every_steps=10, keep=keep))


def whole(offset: float) -> dict[str, Tensor]:
    """The tensors as one process holds them; every element is different."""
    tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        values = torch.arange(torch.Size(shape).numel()).reshape(shape) + 200.0 * number + offset
        tensors[name] = values.bfloat16() if "half" in name else values
    return tensors


@functools.cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


def placed(layout: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of `tensors` that this rank of four holds under `layout`."""

    def on(mesh: DeviceMesh, *placements: Placement) -> Callable[[Tensor], Tensor]:
        return lambda tensor: distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    rank, names = dist.get_rank(), set(tensors)
    flat, square = meshes()
    place, experts = on(flat, Shard(0)), on(flat, Shard(0))
    if layout == "hsdp":
        place, experts = on(square, Replicate(), Shard(0)), on(square, Shard(0), Replicate())
    elif layout == "dp_tp":  # a bias has no columns
        place = lambda t: on(square, Shard(0), Shard(1) if t.ndim > 1 else Replicate())(t)  # noqa: E731
    elif layout == "ep_shard":
        experts = on(square, Shard(1), Shard(0))
    elif layout == "ep":
        place, experts = on(square, Replicate(), Replicate()), on(flat, Shard(0))
    elif layout == "replicated":
        place = experts = on(flat, Replicate())
    elif layout == "plain":
        place = experts = torch.clone
    elif layout == "pp_dp":  # two stages hold the embedding, as where it is tied
        place = experts = on(square["b"], Shard(0))
        names = {name for name in names if f"blocks.{1 - rank // 2}" not in name}
    elif layout == "one rank":
        place, experts, names = torch.clone, torch.clone, names if rank == 2 else set()
    return {name: (experts if "experts" in name else place)(tensors[name]) for name in tensors if name in names}


def state_of(layout: str, offset: float) -> dict[str, Any]:
    """Model and optimizer with the count of each parameter, as plain tensors on all ranks that hold a part of it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    tensors = whole(offset) if layout == "one process" else placed(layout, whole(offset))
    counts = {name: torch.tensor(offset) for name in tensors}
    optimizer = {name: {"average": tensor.clone(), "step": counts[name]} for name, tensor in tensors.items()}
    return {"model": tensors, "optimizer": optimizer, "trainer": {"value": offset + rank, "list": [1, (2, None)]}}


def check(layout: str, state: dict[str, Any], offset: float) -> None:
    expected = state_of(layout, offset)
    assert state["trainer"] == {"value": offset, "list": [1, (2, None)]}  # rank 0's
    assert state["optimizer"].keys() == state["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        for loaded in (state["model"][name], state["optimizer"][name]["average"]):
            assert loaded.dtype == tensor.dtype and type(loaded) is type(tensor)
            assert torch.equal(local(loaded), local(tensor)), name
        assert state["optimizer"][name]["step"] == offset


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(folder: Path, layout: str, offset: float, step: int = 10) -> None:
    manager(folder).save(step, state_of(layout, offset))


def load(folder: Path, layout: str, offset: float) -> None:
    state = state_of(layout, -1.0)
    tensors = dict(state["model"])
    assert manager(folder).load(state) == 10
    check(layout, state, offset)
    assert all(state["model"][name] is tensor for name, tensor in tensors.items())  # filled in place


@pytest.mark.parametrize("saved", [*LAYOUTS, "one process"])
def test_every_layout_loads_what_any_layout_saved(four: Pool, tmp_path: Path, saved: str) -> None:
    if saved == "one process":
        save(tmp_path, saved, 0.5)
    else:
        four.run(save, tmp_path, saved, 0.5)
    for layout in LAYOUTS:
        four.run(load, tmp_path, layout, 0.5)
    load(tmp_path, "one process", 0.5)


def test_each_element_is_written_once(four: Pool, tmp_path: Path) -> None:
    """Copies on several ranks are not several copies on the disk, and the ranks share the writing."""
    save(tmp_path / "one", "one process", 0.5)
    (alone,) = (tmp_path / "one/checkpoints/step-00000010").glob("*.distcp")
    for layout in ("plain", "replicated"):
        four.run(save, tmp_path / layout, layout, 0.5)
        sizes = [path.stat().st_size for path in (tmp_path / layout / "checkpoints/step-00000010").glob("*.distcp")]
        assert len(sizes) == 4 and min(sizes) > 0 and sum(sizes) == alone.stat().st_size


def whatever_is_saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"optimizer": {}, "trainer": {}}
    manager(folder).load(state)
    return {name: tensors["average"] for name, tensors in state["optimizer"].items()}


def test_a_section_that_no_rank_gives_is_read_whole_by_all(four: Pool, tmp_path: Path) -> None:
    four.run(save, tmp_path, "pp_dp", 0.5)
    for found in four.run(whatever_is_saved, tmp_path):
        assert found.keys() == SHAPES.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in whole(0.5).items())


# ---------------------------------------------------------------------------- failures


def failing(action: str, folder: Path, culprit: int) -> str:
    """Let rank `culprit` alone fail while all ranks act; returns the type and text of what was raised here."""
    rank, state, write = dist.get_rank(), state_of("hsdp", 1.0), os.write

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        if action == "no room":
            os.write = full if rank == culprit else write
        elif action == "no JSON" and rank == culprit:
            state["trainer"]["value"] = {1, 2}
        elif action == "other shape" and rank == culprit:
            state["model"]["blocks.0.bias"] = torch.zeros(9)
        elif action == "other name" and rank == culprit:
            state["model"]["more"] = torch.zeros(9)
        elif action == "name missing":
            del state["model"]["blocks.0.bias"]
        elif action == "own folder" and rank == culprit:
            folder = folder / "elsewhere"
        if action in ("no room", "no JSON", "own folder"):
            manager(folder).save(20, state)
        else:
            manager(folder).load(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.write = write
        dist.barrier()
    return "nothing was raised"


@pytest.mark.parametrize(
    ("action", "culprit", "sentence"),
    [
        ("no room", 0, "no room for a checkpoint of"),
        ("no room", 3, "no room for a checkpoint of"),
        ("own folder", 1, "put training.run on a file system that all ranks share"),
    ],
)
def test_a_rank_that_cannot_write_fails_all_and_leaves_the_old(
    four: Pool, tmp_path: Path, action: str, culprit: int, sentence: str
) -> None:
    four.run(save, tmp_path, "dp4", 0.5)
    for text in four.run(failing, action, tmp_path, culprit):
        assert text.startswith("CheckpointError") and sentence in text
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000010"}
    load(tmp_path, "one process", 0.5)
    four.run(save, tmp_path, "ep", 0.5)  # and saving goes on


def test_a_bug_on_one_rank_is_named_on_the_others(four: Pool, tmp_path: Path) -> None:
    texts = four.run(failing, "no JSON", tmp_path, 2)
    assert texts[2].startswith("TypeError: trainer.value is a set")
    for text in texts[:2] + texts[3:]:
        assert text.startswith("CheckpointError: rank 2 failed (TypeError('trainer.value is a set")


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("other shape", r"model.blocks.0.bias was saved as torch.float32 [3], this run has torch.float32 [9]"),
        ("other name", r"model.more is not in the checkpoint (1 names differ)"),
        ("name missing", r"model.blocks.0.bias is not in this run (1 names differ)"),
    ],
)
def test_a_rank_with_another_model_is_named_by_all(four: Pool, tmp_path: Path, action: str, sentence: str) -> None:
    four.run(save, tmp_path, "dp4", 0.5)
    for text in four.run(failing, action, tmp_path, 3):
        assert text.startswith("CheckpointError") and sentence in text


@pytest.mark.parametrize("fault", ["truncated", "corrupt", "missing"])
def test_a_broken_file_of_any_rank_is_found_by_all(four: Pool, tmp_path: Path, fault: str) -> None:
    four.run(save, tmp_path, "dp4", 0.5)
    for number, path in enumerate(sorted((tmp_path / "checkpoints/step-00000010").glob("*.distcp"))):
        content = path.read_bytes()
        if fault == "missing":
            path.unlink()
        elif fault == "truncated":
            path.write_bytes(content[:-1])
        else:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for text in four.run(failing, "a broken file", tmp_path, 0):
            assert text.startswith("CheckpointError") and f"__{number}_0.distcp is {fault}" in text
        with pytest.raises(CheckpointError, match=f"__{number}_0.distcp is {fault}"):
            load(tmp_path, "one process", 0.5)
        path.write_bytes(content)
    four.run(load, tmp_path, "dp4", 0.5)


def commit_too_early(folder: Path) -> list[str]:
    """The names in the checkpoints' folder when a slow rank has just written its part."""
    seen: list[str] = []
    original = os.fsync
    if dist.get_rank() == 3:
        os.fsync = lambda descriptor: seen.extend(path.name for path in (folder / "checkpoints").iterdir())
    try:
        manager(folder).save(20, state_of("dp4", 1.0))
    finally:
        os.fsync = original
    return seen


def test_nothing_is_committed_while_a_rank_still_writes(four: Pool, tmp_path: Path) -> None:
    four.run(save, tmp_path, "dp4", 0.5)
    *others, slow = four.run(commit_too_early, tmp_path)
    assert others == [[], [], []]
    assert set(slow) == {"step-00000010", "step-00000020.partial"}
    assert manager(tmp_path).latest_step() == 20
