"""Reads and writes folders of safetensors: one file, or several shards with `model.safetensors.index.json`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmoe.errors import DataError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise DataError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; name a folder with config.json and safetensors weights") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); copy it again from where it is whole") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; copy it again from where it is whole")
    return content


class TensorReader:
    """Reads the tensors of a folder by name, each when it is asked for; `unread` are the names nobody asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the tensors of `folder`; raise DataError when there are none, or the index names a missing file."""
        self.folder = folder
        if (folder / INDEX).is_file():
            where = read_json(folder / INDEX).get("weight_map")
            if not isinstance(where, dict):
                raise DataError(f"{folder / INDEX} has no weight_map; copy it again from where it is whole")
            self._file = {name: folder / file for name, file in where.items()}
            if missing := sorted({str(file) for file in self._file.values() if not file.is_file()}):
                raise DataError(f"{missing[0]} is named by {INDEX} but is not there; copy all shards")
        elif (folder / SINGLE).is_file():
            self._file = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
        else:
            raise DataError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are not read: "
                "convert them with transformers' save_pretrained"
            )
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file:
            raise DataError(f"{self.folder} has no tensor {name}; its weights do not fit its config.json")
        self._read.add(name)
        path = self._file[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: {name} cannot be read ({error}); copy the file again") from error

    def unread(self) -> list[str]:
        """Return the sorted names of the tensors that nobody asked for."""
        return sorted(self._file.keys() - self._read)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, dtype: torch.dtype) -> None:
    """Write `tensors` (views are fine) as `dtype`, in files of at most `shard_bytes`, in the order given.

    A tensor larger than that gets a file of its own. One shard at a time is copied into memory.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    room, total = shard_bytes, 0
    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, tensor))
        room -= size
        total += size
    where: dict[str, str] = {}  # tensor -> file
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A clone each: safetensors refuses tensors that share memory.
        content = {key: torch.empty(t.shape, dtype=dtype).copy_(t.detach()) for key, t in shard}
        save_file(content, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(content, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
