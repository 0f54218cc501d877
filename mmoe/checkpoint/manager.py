"""Checkpoints of one process: written beside the old ones, renamed into place, and only then pointed to.

::

    checkpoints/latest                      the name of the newest durable checkpoint
    checkpoints/step-00000100/manifest.json every other file with its size and CRC-32
                              state.json    all that is not a tensor
                              .metadata     } torch.distributed.checkpoint: the tensors, by name
                              __0_0.distcp  }
    checkpoints/step-00000200.partial/      being written, or left by a crash: never read, removed by `save`
    checkpoints/step-00000100.replaced/     the older checkpoint of a step, until the newer one is in place

torch keeps the placement of tensors (`.metadata`) as a pickle: load only checkpoints you trust.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mmoe.checkpoint.files import CheckedFileSystem, check, sync_folder
from mmoe.checkpoint.tree import join, names, split
from mmoe.config.base import Config
from mmoe.errors import CheckpointError

FORMAT = 1
PARTIAL, REPLACED = ".partial", ".replaced"
MARGIN = 1 << 20  # bytes of names, headers and state.json


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)  # the newest checkpoints that are not deleted

    def due(self, step: int, last_step: int) -> bool:
        """Whether a checkpoint is written after `step` (1-based) of `last_step`."""
        return step % self.every_steps == 0 or step == last_step


class CheckpointManager:
    """Saves and loads states (`mmoe.checkpoint.tree`) under `folder`. Every failure is a CheckpointError."""

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        self.folder, self.config = Path(folder), config

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._committed())

    def latest_step(self) -> int | None:
        """The step `latest` points to; None where nothing was saved yet."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        step = _step_of(name)
        if step is None or step not in self._committed():
            raise CheckpointError(
                f"{pointer} names {name!r}, which is not there; resume from one of the steps {self._list()}"
            )
        return step

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step` and point `latest` to it; returns its folder.

        An older checkpoint of that step is replaced. When anything fails, what was there before is left as it
        was, `latest` included, and the part that was written is removed.
        """
        document, tensors = split(state)
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) + MARGIN
        final = self.folder / f"step-{step:08d}"
        partial, pointer = final.with_name(final.name + PARTIAL), self.folder / f"latest{PARTIAL}"
        with _write_errors(self.folder, needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))
            try:
                self._write(partial, document, tensors, {"format": FORMAT, "step": step})
                # The pointer's text is durable before anything moves: from here on nothing needs room.
                CheckedFileSystem().write(pointer, f"{final.name}\n".encode())
                self._commit(partial, final, pointer)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                pointer.unlink(missing_ok=True)
                raise
            self._retire(step)
        return final

    def load(self, state: dict[str, Any], step: int | None = None) -> int:
        """Fill `state` from the checkpoint of `step` (None: the latest); returns its step.

        The keys of `state` choose the sections to read. A tensor of `state` is filled in place and must have
        the name, shape and dtype of the saved one; a section without tensors takes whatever was saved, on the
        CPU. Everything that is not a tensor is replaced.
        """
        folder, step = self._find(step)
        with _read_errors(folder):
            manifest = _manifest(folder)
            for name, file in manifest["files"].items():
                check(folder / name, file["bytes"], file["crc32"])
            document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._fill(folder, document, state)
        return step

    def _fill(self, folder: Path, document: dict[str, Any], state: dict[str, Any]) -> None:
        if missing := state.keys() - document.keys():
            raise CheckpointError(f"{folder}/state.json has no {sorted(missing)[0]!r}; it was saved by another program")
        wanted = {name: document[name] for name in state}
        _, given = split(state)
        reader = dcp.FileSystemReader(folder)
        saved = reader.read_metadata().state_dict_metadata
        for section, part in wanted.items():
            own = {name for name in given if name == section or name.startswith(f"{section}.")}
            _match(folder, {name: given[name] for name in own}, {name: saved[name] for name in names(part)})
        tensors = {name: given[name] if name in given else _empty(saved[name]) for name in names(wanted)}
        with _single_process(), _unwrapped():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        state.update(join(wanted, tensors))

    def _write(self, partial: Path, document: Any, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        # The file system makes each file durable as it is closed, so torch need not.
        writer = dcp.FileSystemWriter(partial, sync_files=False, overwrite=False)
        writer.fs = files = CheckedFileSystem()
        with _single_process(), _unwrapped():
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        files.write(partial / "state.json", json.dumps(document).encode())
        manifest["files"] = {path.name: {"bytes": size, "crc32": crc} for path, (size, crc) in files.written.items()}
        files.write(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(partial)

    def _commit(self, partial: Path, final: Path, pointer: Path) -> None:
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self.folder)
        pointer.replace(self.folder / "latest")
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _retire(self, newest: int) -> None:
        """Delete all but the newest; steps after `newest` are of a course the run left, and count as old."""
        committed = self._committed()
        for step in sorted(committed, key=lambda step: (step <= newest, step))[: -self.config.keep]:
            # Renamed first: a crash half-way through the deletion must not leave what looks committed.
            doomed = committed[step].with_name(committed[step].name + PARTIAL)
            committed[step].rename(doomed)
            shutil.rmtree(doomed)

    def _clean(self) -> None:
        """Undo what a crash left half done."""
        for path in self.folder.iterdir():
            if path.name.endswith(REPLACED):
                final = path.with_name(path.name.removesuffix(REPLACED))
                if final.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(final)
            elif path.name.endswith(PARTIAL):
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def _committed(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        found = {_step_of(path.name.removesuffix(REPLACED)): path for path in folders if path.name.endswith(REPLACED)}
        found |= {_step_of(path.name): path for path in folders}
        return {step: path for step, path in found.items() if step is not None}

    def _find(self, step: int | None) -> tuple[Path, int]:
        chosen = self.latest_step() if step is None else step
        if chosen is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint; train the run first")
        committed = self._committed()
        if chosen not in committed:
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {chosen}; choose from {self._list()}")
        return committed[chosen], chosen

    def _list(self) -> str:
        return ", ".join(str(step) for step in sorted(self._committed())) or "(none)"


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdecimal() else None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt ({error}); resume from an earlier checkpoint") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version!r}, this mmoe reads {FORMAT}; load it with the version that wrote it"
        )
    return manifest


def _empty(saved: TensorStorageMetadata) -> Tensor:
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _match(folder: Path, given: dict[str, Tensor], saved: dict[str, TensorStorageMetadata]) -> None:
    """Raises CheckpointError unless `given` is empty or has the names, shapes and dtypes of `saved`."""
    if not given:
        return
    remedy = "load it with the model.* and precision.* it was trained with (config.yaml of its run)"
    if odd := sorted(given.keys() ^ saved.keys()):
        where = "the checkpoint" if odd[0] in given else "this run"
        raise CheckpointError(f"{folder}: {odd[0]} is not in {where} ({len(odd)} names differ); {remedy}")
    for name, tensor in given.items():
        ours, theirs = (
            (tuple(tensor.shape), tensor.dtype),
            (tuple(saved[name].size), saved[name].properties.dtype),
        )
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: {name} was saved as {theirs[1]} {list(theirs[0])}, "
                f"this run has {ours[1]} {list(ours[0])}; {remedy}"
            )


@contextmanager
def _write_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            raise CheckpointError(
                f"{folder}: no room for a checkpoint of {needed:,} bytes ({free:,} free); earlier "
                "checkpoints are intact; free space, lower checkpoint.keep or move training.run"
            ) from error
        raise CheckpointError(
            f"{error.filename or folder}: saving a checkpoint of {needed:,} bytes failed ({error.strerror}); "
            "earlier checkpoints are intact; make the folder writable, or put training.run elsewhere"
        ) from error


@contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}); resume from another checkpoint"
        ) from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """torch wraps every error, Ctrl-C included, in a CheckpointException: raise what happened."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
