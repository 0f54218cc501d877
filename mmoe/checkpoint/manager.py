"""Checkpoints of a run in any layout: written beside the old ones, renamed into place, and only then pointed to.

::

    checkpoints/latest                      the name of the newest durable checkpoint
    checkpoints/step-00000100/manifest.json every other file with its size and CRC-32
                              state.json    all that is not a tensor
                              .metadata     } torch.distributed.checkpoint: the tensors, by name,
                              __0_0.distcp  } in one file of every rank
    checkpoints/step-00000200.partial/      being written, or left by a crash: never read, removed by `save`
    checkpoints/step-00000100.replaced/     the older checkpoint of a step, until the newer one is in place

All ranks of the default process group save and load together, in a folder that they share. Tensors are plain or
DTensors; several ranks may hold a name, as shards or as equal copies, and a rank (of a pipeline) only some of the
names. What was saved under one layout loads under any other, one process included. All that is not a tensor is
rank 0's, random states included: they differ between ranks, but every training step seeds itself.

torch keeps the placement of tensors (`.metadata`) as a pickle: load only checkpoints you trust.
"""

import errno
import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mmoe.checkpoint.files import CheckedFileSystem, check, sync_folder
from mmoe.checkpoint.ranks import Ranks
from mmoe.checkpoint.tree import join, merge, places, prune, split
from mmoe.checkpoint.upgrade import from_format_1
from mmoe.config.base import Config
from mmoe.errors import CheckpointError

FORMAT = 2  # 1, still read, numbered the optimizer's states: only names mean the same in every layout
PARTIAL, REPLACED = ".partial", ".replaced"
MARGIN = 1 << 20  # bytes of names, headers and state.json

Form = tuple[tuple[int, ...], torch.dtype]  # of a tensor: its global shape and dtype


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)  # the newest checkpoints that are not deleted

    def due(self, step: int, last_step: int) -> bool:
        """Whether a checkpoint is written after `step` (1-based) of `last_step`."""
        return step % self.every_steps == 0 or step == last_step


class CheckpointManager:
    """Saves and loads states (`mmoe.checkpoint.tree`) under `folder`. Every failure is a CheckpointError.

    `latest_step`, `save` and `load` are for all ranks of the default process group at once: what fails on one raises on
    all.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        self.folder, self.config = Path(folder), config

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._committed())

    def latest_step(self) -> int | None:
        """The step `latest` points to; None where nothing was saved yet."""
        return Ranks().first(self._latest)  # what other machines see of a shared folder may be some seconds old

    def _latest(self) -> int | None:
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
        ranks = Ranks()
        document, tensors = ranks.every(lambda: split(state))
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}  # of all shards
        held = ranks.gather((document, sizes))
        needed = ranks.first(lambda: sum(_union(sizes for _, sizes in held).values()) + MARGIN)
        final = self.folder / f"step-{step:08d}"
        partial, pointer = final.with_name(final.name + PARTIAL), self.folder / f"latest{PARTIAL}"
        with _write_errors(self.folder, needed):
            ranks.first(lambda: self._prepare(partial, needed))
            try:
                written = ranks.gather(_write(partial, tensors, ranks))
                ranks.first(lambda: _finish(partial, step, [document for document, _ in held], _union(written)))
                ranks.first(lambda: self._commit(partial, final, pointer))
            except BaseException:
                if ranks.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    pointer.unlink(missing_ok=True)
                raise
            ranks.first(lambda: self._retire(step))
        return final

    def load(self, state: dict[str, Any], step: int | None = None) -> int:
        """Fill `state` from the checkpoint of `step` (None: the latest); returns its step.

        The keys of `state` choose the sections to read. A tensor of `state` is filled in place and must have
        the name, shape and dtype of the saved one; all ranks together hold all names of a section. A section
        without tensors on any rank takes whatever was saved, on the CPU. Everything that is not a tensor is
        replaced.
        """
        ranks = Ranks()
        folder, step = ranks.first(lambda: self._find(step))
        with _read_errors(folder):
            manifest = ranks.first(lambda: _manifest(folder))
            shared = list(manifest["files"].items())[ranks.rank :: ranks.size]
            ranks.every(lambda: [check(folder / name, file["bytes"], file["crc32"]) for name, file in shared])
            document = ranks.first(lambda: json.loads((folder / "state.json").read_text(encoding="utf-8")))
            _fill(folder, manifest["format"], document, state, ranks)
        return step

    def _prepare(self, partial: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    def _commit(self, partial: Path, final: Path, pointer: Path) -> None:
        # The pointer's text is durable before anything moves: from here on nothing needs room.
        CheckedFileSystem().write(pointer, f"{final.name}\n".encode())
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
        chosen = self._latest() if step is None else step
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
    if version not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path} has format {version!r}, this mmoe reads 1 to {FORMAT}; load it with the version that wrote it"
        )
    return manifest


def _union(parts: Iterable[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def _write(partial: Path, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, tuple[int, int]]:
    """Write this rank's share of the tensors; returns the size and CRC-32 of its files by name."""
    # The file system makes each file durable as it is closed, so torch need not.
    writer = dcp.FileSystemWriter(partial, sync_files=False, overwrite=False)
    writer.fs = files = CheckedFileSystem()
    with _single_process(), _unwrapped(ranks):
        dcp.save(tensors, storage_writer=writer, no_dist=not ranks.grouped)
    return {path.name: sums for path, sums in files.written.items()}


def _finish(partial: Path, step: int, documents: list[Any], written: dict[str, tuple[int, int]]) -> None:
    """Write what rank 0 writes for all ranks."""
    for name, (size, _) in written.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise CheckpointError(
                f"{partial / name} was written by another rank and is not whole where rank 0 looks; "
                "put training.run on a file system that all ranks share"
            )
    files = CheckedFileSystem()
    files.write(partial / "state.json", json.dumps(functools.reduce(merge, documents)).encode())
    written = written | {path.name: sums for path, sums in files.written.items()}
    sums = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in written.items()}
    manifest = {"format": FORMAT, "step": step, "files": sums}
    files.write(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(partial)


def _fill(folder: Path, version: int, document: dict[str, Any], state: dict[str, Any], ranks: Ranks) -> None:
    if version == 1:
        document = from_format_1(document)
    given = ranks.every(lambda: _tensors(folder, document, state))
    stored = places(document)
    if version == 1:  # a parameter without a gradient had no state: this run's is the initial one
        given = {name: given[name] for name in given if name in stored or not name.startswith("optimizer.")}
    reader = dcp.FileSystemReader(folder)
    saved = ranks.every(lambda: reader.read_metadata().state_dict_metadata)
    forms = ranks.gather({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()})
    theirs = {name: (tuple(saved[key].size), saved[key].properties.dtype) for name, key in stored.items()}
    sharded = ranks.first(lambda: {part for part in document if _match(folder, part, _union(forms), theirs)})
    for part in state.keys() - sharded:
        given |= {name: torch.empty(theirs[name][0], dtype=theirs[name][1]) for name in places(document[part], part)}
    tensors = {stored[name]: tensor for name, tensor in given.items()}
    with _single_process(), _unwrapped(ranks):
        dcp.load(tensors, storage_reader=reader, no_dist=not ranks.grouped)
    state.update(join(prune({part: document[part] for part in state}, tensors.keys()), tensors))


def _tensors(folder: Path, document: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `state`; raises CheckpointError where `document` lacks one of its sections."""
    if missing := state.keys() - document.keys():
        raise CheckpointError(f"{folder}/state.json has no {sorted(missing)[0]!r}; it was saved by another program")
    return split(state)[1]


def _match(folder: Path, section: str, ours: dict[str, Form], theirs: dict[str, Form]) -> bool:
    """Whether this run holds tensors of `section`; raises CheckpointError unless they are then the saved ones."""
    given, saved = (
        {name: form for name, form in forms.items() if name == section or name.startswith(f"{section}.")}
        for forms in (ours, theirs)
    )
    if not given:
        return False
    remedy = "load it with the model.* and precision.* it was trained with (config.yaml of its run)"
    if odd := sorted(given.keys() ^ saved.keys()):
        where = "the checkpoint" if odd[0] in given else "this run"
        raise CheckpointError(f"{folder}: {odd[0]} is not in {where} ({len(odd)} names differ); {remedy}")
    for name, (shape, dtype) in given.items():
        if (shape, dtype) != saved[name]:
            raise CheckpointError(
                f"{folder}: {name} was saved as {saved[name][1]} {list(saved[name][0])}, "
                f"this run has {dtype} {list(shape)}; {remedy}"
            )
    return True


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
def _unwrapped(ranks: Ranks) -> Iterator[None]:
    """torch wraps every error, Ctrl-C included, in a CheckpointException: raise what happened."""
    try:
        yield
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        if ranks.rank in error.failures:
            raise error.failures[ranks.rank][0] from None
        raise ranks.shared(failure, rank) from None


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
