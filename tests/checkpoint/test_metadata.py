"""A checkpoint of a stranger runs nothing: the pickles in it may only be what torch's placement and tensors are."""

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.metadata import read_metadata
from mmoe.errors import CheckpointError
from tests.checkpoint.states import loaded, manager, sealed, state_of


class Attack:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def tensor(size: int = 5) -> TensorStorageMetadata:
    shape = torch.Size([size])
    return TensorStorageMetadata(TensorProperties(), shape, [ChunkStorageMetadata(torch.Size([0]), shape)])


def placement(weight: Any = None, place: Any = None, **more: Any) -> Metadata:
    index = MetadataIndex("model.weight", [0], 0)
    return Metadata(
        {"model.weight": weight or tensor()},
        storage_data={index: place or _StorageInfo("__0_0.distcp", 0, 400)},
        **more,
    )


def refused(folder: Path, pickled: Any) -> str:
    """The sentence with which a checkpoint of the placement `pickled` is refused."""
    checkpoint = manager(folder).save(10, state_of(1.0))
    content = pickled if isinstance(pickled, bytes) else pickle.dumps(pickled)
    (checkpoint / ".metadata").write_bytes(content)
    sealed(checkpoint)
    with pytest.raises(CheckpointError) as error:
        loaded(manager(folder))
    return str(error.value)


def test_the_placement_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(3, 2).bfloat16(), "b": torch.tensor(1.5), "c": torch.zeros(0, 3)}}
    folder = manager(tmp_path).save(10, state)
    theirs, ours = dcp.FileSystemReader(folder).read_metadata(), read_metadata(folder / ".metadata", {"__0_0.distcp"})
    assert ours.storage_data == theirs.storage_data and len(ours.storage_data) == 3
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data


def test_a_crafted_placement_runs_nothing_and_is_named(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for number, crafted in enumerate((Attack(made), placement(Attack(made)), placement(planner_data=Attack(made)))):
        sentence = refused(tmp_path / str(number), crafted)
        assert ".metadata names posix.mkdir" in sentence and not made.exists()
    pickle.loads(pickle.dumps(Attack(made)))
    assert made.exists()  # it does what it should where nothing stops it


def test_a_placement_of_bytes_is_refused_since_torch_would_unpickle_them(tmp_path: Path) -> None:
    sentence = refused(tmp_path, placement(BytesStorageMetadata()))
    assert "names torch.distributed.checkpoint.metadata.BytesStorageMetadata" in sentence


@pytest.mark.parametrize(
    ("crafted", "why"),
    [
        (placement(place=_StorageInfo("../../secret", 0, 400)), "a tensor in '../../secret'"),
        (placement(place=_StorageInfo("__0_0.distcp", 0, 400, ["zstd"])), "a tensor in '__0_0.distcp'"),
        (placement(place=_StorageInfo("__0_0.distcp", -5, 400)), "a tensor at byte -5"),
        (placement(weight=tensor(2**50)), "its tensors would take 4,503,599,627,370,496 bytes"),
        (placement(weight=3), "a int where a TensorStorageMetadata belongs"),
        (Metadata(3, storage_data=[]), "a int where a dict belongs"),
        ({"state_dict_metadata": {}}, "a dict where a Metadata belongs"),
        (b"", "EOFError"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", "Error"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.", "KeyError"),  # a bytearray of 1 TiB
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "KeyError"),  # number 2^31 of what is remembered
        (b"cbuiltins\neval\n(S'1'\ntR.", "names builtins.eval"),
        (b"ctorch\nload\n(S'x'\ntR.", "names torch.load"),
        (b"ctorch\nfloat32\n}S'a'\nI1\nsb.", "Error"),
    ],
)
def test_a_placement_of_another_shape_is_one_sentence(tmp_path: Path, crafted: Any, why: str) -> None:
    sentence = refused(tmp_path, crafted)
    assert why in sentence and ".metadata" in sentence


def test_classes_that_a_pickle_changes_are_its_own(tmp_path: Path) -> None:
    """BUILD with slots sets attributes of whatever is on the stack: of torch's class it would last."""
    name = "torch.distributed.checkpoint.metadata\nTensorStorageMetadata"
    refused(tmp_path, f"c{name}\n(N}}".encode() + b"X\4\0\0\0sizeK\3stb.")
    assert not hasattr(TensorStorageMetadata, "size")


def test_a_damaged_placement_is_a_checkpoint_error_whatever_the_damage(tmp_path: Path) -> None:
    path = manager(tmp_path).save(10, state_of(1.0)) / ".metadata"
    content, draw, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed[: draw.choice([len(changed), draw.randrange(len(changed))])])
        try:
            read_metadata(path, {"__0_0.distcp"})
        except CheckpointError:
            refusals += 1
    assert refusals > 500


@pytest.mark.parametrize("crafted", ["attack", "no tensor", "no zip"])
def test_a_crafted_tensor_file_runs_nothing_and_is_named(tmp_path: Path, crafted: str) -> None:
    made, buffer = tmp_path / "made", io.BytesIO()
    torch.save(Attack(made) if crafted == "attack" else {"a": 1}, buffer)
    checkpoint = manager(tmp_path).save(10, state_of(1.0))
    path = checkpoint / "__0_0.distcp"
    content = b"x" * 400 if crafted == "no zip" else buffer.getvalue()
    path.write_bytes(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(placement(place=_StorageInfo(path.name, 0, len(content)))))
    sealed(checkpoint)
    assert Manifest.read(checkpoint).files[path.name][0] == len(content)
    with pytest.raises(CheckpointError, match="step-00000010: its .distcp files are not the tensors"):
        loaded(manager(tmp_path))
    assert not made.exists()
