"""Checkpoints of a run in any layout: written beside the old ones and renamed into place.

::

    checkpoints/step-00000100/manifest.json every other file with its size and CRC-32
                              config.yaml   the run's, as it was then
                              state.json    all that is not a tensor
                              .metadata     } torch.distributed.checkpoint: the tensors, by name,
                              __0_0.distcp  } in one file of every rank
    checkpoints/step-00000200.partial/      being written, or left by a crash: never read, removed by `save`
    checkpoints/step-00000100.replaced/     the older checkpoint of a step, until the newer one is in place
    checkpoints/step-00000300.left/         set aside by `go_back`: the run went on from an older one

A folder ``step-*`` is committed, and nothing points to it: it is whole when its files are those of its manifest. The
newest one is the one of the highest step. A run that continues from an older one (because it was told to, or
because the newer ones are damaged) first sets the newer ones aside, and so has one course only.

All ranks of the default process group save and load together, in a folder that they share. Tensors are plain or
DTensors; several ranks may hold a name, as shards or as equal copies, and a rank (of a pipeline) only some of the
names. What was saved under one layout loads under any other, one process included. All that is not a tensor is
rank 0's, random states included: they differ between ranks, but every training step seeds itself.

Nothing in a checkpoint is run: see `mmoe.checkpoint.metadata` on the pickle in which torch keeps `.metadata`.
"""

import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from mmoe.checkpoint.files import CheckedFileSystem, DamagedError, check, sync_folder
from mmoe.checkpoint.manifest import FORMAT, MANIFEST, Manifest
from mmoe.checkpoint.tensors import fill, union, write
from mmoe.checkpoint.tree import check_document, merge, split
from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.errors import CheckpointError
from mmoe.runtime.agreement import Ranks

logger = logging.getLogger(__name__)

PARTIAL, REPLACED, LEFT = ".partial", ".replaced", ".left"
POINTER = "latest"  # of format 2, which named the newest checkpoint in it
MARGIN = 1 << 20  # bytes of names, headers and state.json

T = TypeVar("T")


class CheckpointConfig(Config):
    """Say how often a run is saved, and how many of its checkpoints are kept."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)  # the newest checkpoints that are not deleted

    def due(self, step: int, last_step: int) -> bool:
        """Whether a checkpoint is written after `step` (1-based) of `last_step`."""
        return step % self.every_steps == 0 or step == last_step


class CheckpointManager:
    """Saves and loads states (`mmoe.checkpoint.tree`) under `folder`. Every failure is a CheckpointError.

    `latest_step`, `save`, `load` and `go_back` are for all ranks of the default process group at once: what fails on
    one raises on all.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        self.folder, self.config = Path(folder), config

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(self._committed())

    def latest_step(self) -> int | None:
        """The newest step; None where nothing was saved yet.

        Raises CheckpointError where there are none but checkpoints that were set aside.
        """
        return Ranks().first(self._latest)  # what other machines see of a shared folder may be some seconds old

    def save(self, step: int, state: dict[str, Any], texts: Mapping[str, str] | None = None) -> Path:
        """Write `state`, and `texts` as files of these names, as the checkpoint of `step`; returns its folder.

        An older checkpoint of that step is replaced. When anything fails, what was there before is left as it was,
        and the part that was written is removed.
        """
        ranks = Ranks()
        document, tensors = ranks.every(lambda: split(state))
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}  # of all shards
        held = ranks.gather((document, sizes))
        needed = ranks.first(lambda: sum(union(sizes for _, sizes in held).values()) + MARGIN)
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        with _write_errors(self.folder, f"a checkpoint of {needed:,} bytes"):
            ranks.first(lambda: self._prepare(partial, needed))
            try:
                written = ranks.gather(write(partial, tensors, ranks))
                documents = [document for document, _ in held]
                ranks.first(lambda: _finish(partial, step, documents, union(written), texts or {}))
                ranks.first(lambda: self._commit(partial, final))
            except BaseException:
                if ranks.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            ranks.first(lambda: self._retire(step))
        return final

    def load(self, state: dict[str, Any], step: int | None = None) -> int:
        """Fill `state` from the checkpoint of `step` (None: the newest that is whole); returns its step.

        Damaged ones that are passed over are said on stderr. The keys of `state` choose the sections to read. A
        tensor of `state` is filled in place and must have the name, shape and dtype of the saved one; all ranks
        together hold all names of a section. A section without tensors on any rank takes whatever was saved, on
        the CPU. Everything that is not a tensor is replaced.
        """
        ranks = Ranks()
        folder, manifest = self._whole(step, ranks)
        with _read_errors(folder):
            document = ranks.first(lambda: _document(folder))
            fill(folder, manifest, document, state, ranks)
        return manifest.step

    def go_back(self, step: int) -> None:
        """Make `step` the newest: whatever is newer is of a course that the run left, and is set aside.

        What is set aside is not loaded, and retention counts it as older than all else. Does nothing where nothing is
        newer.
        """
        with _write_errors(self.folder, "the names of checkpoints that are set aside"):
            Ranks().first(lambda: self._go_back(step))

    def text(self, name: str) -> tuple[Path, str] | None:
        """The file `name` that `save` was given, of the newest checkpoint where it is whole; for one process."""
        for step in reversed(self.steps()):
            folder = self._committed()[step]
            try:
                check(folder / name, *Manifest.read(folder).files[name])
                return folder / name, (folder / name).read_text(encoding="utf-8")
            except (CheckpointError, KeyError, OSError):
                continue
        return None

    def _latest(self) -> int | None:
        if steps := self.steps():
            return steps[-1]
        if left := sorted(path.name for path in self._folders() if path.name.endswith(LEFT)):
            raise CheckpointError(
                f"{self.folder} holds no checkpoint but {', '.join(left)}, which the run had left; remove {LEFT} from "
                "the name of the one to resume from, or start over with --fresh"
            )
        return None

    def _whole(self, step: int | None, ranks: Ranks) -> tuple[Path, Manifest]:
        """The checkpoint of `step`, or the newest whose files are all as they were written, all ranks agreeing."""
        damage: list[str] = []
        tried: set[Path] = set()
        while folders := ranks.first(lambda: [path for path in self._candidates(step) if path not in tried]):
            folder = folders[0]
            tried.add(folder)
            manifest, found = ranks.first(functools.partial(_attempt, folder, Manifest.read, folder))
            if manifest is not None:
                shared = list(manifest.files.items())[ranks.rank :: ranks.size]
                mine = ranks.every(functools.partial(_attempt, folder, _check_all, folder, shared))[1]
                found = ranks.first(functools.partial(next, filter(None, ranks.gather(mine)), None))
            if manifest is None or found is not None:
                damage.append(str(found))
                continue
            if damage and ranks.rank == 0:
                logger.warning(f"{'; '.join(damage)}: this goes on from {folder.name} instead")
            return folder, manifest
        raise CheckpointError(ranks.first(lambda: self._no_whole(step, damage)))

    def _candidates(self, step: int | None) -> list[Path]:
        """The checkpoints to try, in this order."""
        committed = self._committed()
        if step is None:
            if self._latest() is None:
                raise CheckpointError(f"{self.folder} holds no checkpoint; train the run first")
            return [committed[step] for step in sorted(committed, reverse=True)]
        if step in committed:
            return [committed[step]]
        left = self.folder / f"step-{step:08d}{LEFT}"
        hint = f"; the run had left {left}: remove {LEFT} from its name to return to it" if left.is_dir() else ""
        choice = f"choose from {', '.join(map(str, sorted(committed)))}" if committed else "it holds none"
        raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; {choice}{hint}")

    def _no_whole(self, step: int | None, damage: list[str]) -> str:
        if step is None:
            more = f" (and {len(damage) - 1} older ones are damaged too)" if len(damage) > 1 else ""
            return (
                f"{damage[0]}{more}; no checkpoint of {self.folder} is whole to resume from: copy an earlier or this "
                "one again from where it is whole, or start over with --fresh"
            )
        others = ", ".join(str(other) for other in self.steps() if other != step)
        instead = f"resume from an earlier checkpoint (there are {others})" if others else "there is no other"
        return f"{damage[0]}; {instead}, or copy the file again from where it is whole"

    def _prepare(self, partial: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    def _commit(self, partial: Path, final: Path) -> None:
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)  # from here on it is found
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _retire(self, saved: int) -> None:
        """Delete all but the newest, those that were set aside first; never the one of the step just `saved`."""
        committed = self._committed()
        left = sorted(path for path in self._folders() if path.name.endswith(LEFT))
        kept = [committed[step] for step in sorted(committed)]
        for path in (left + kept)[: -self.config.keep]:
            if path != committed[saved]:
                _delete(path)

    def _go_back(self, step: int) -> None:
        # The oldest first: until the last is renamed, a run that was killed here resumes where it stood.
        for newer in [other for other in self.steps() if other > step]:
            path = self._committed()[newer]
            left = self.folder / f"step-{newer:08d}{LEFT}"
            if left.exists():
                _delete(left)
            path.rename(left)
        if self.folder.is_dir():
            sync_folder(self.folder)

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
            elif path.name == POINTER:
                path.unlink()

    def _committed(self) -> dict[int, Path]:
        folders = self._folders()
        found = {_step_of(path.name.removesuffix(REPLACED)): path for path in folders if path.name.endswith(REPLACED)}
        found |= {_step_of(path.name): path for path in folders}
        return {step: path for step, path in found.items() if step is not None}

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdecimal() else None


def _delete(path: Path) -> None:
    # Renamed first: a crash half-way through the deletion must not leave what looks committed.
    doomed = path.with_name(path.name + PARTIAL)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _check_all(folder: Path, files: list[tuple[str, tuple[int, int]]]) -> None:
    for name, sums in files:
        check(folder / name, *sums)


def _attempt(folder: Path, act: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """What `act` returns, and what is damaged in `folder` where it cannot."""
    try:
        with _read_errors(folder):
            return act(*arguments), None
    except DamagedError as error:
        return None, str(error)


def _finish(
    partial: Path, step: int, documents: list[Any], written: dict[str, tuple[int, int]], texts: Mapping[str, str]
) -> None:
    """Write what rank 0 writes for all ranks."""
    for name, (size, _) in written.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise CheckpointError(
                f"{partial / name} was written by another rank and is not whole where rank 0 looks; "
                "put training.run on a file system that all ranks share"
            )
    files = CheckedFileSystem()
    for name, text in texts.items():
        files.write(partial / name, text.encode())
    files.write(partial / "state.json", json.dumps(functools.reduce(merge, documents)).encode())
    written = written | {path.name: sums for path, sums in files.written.items()}
    files.write(partial / MANIFEST, Manifest(FORMAT, step, written).to_json().encode())
    sync_folder(partial)


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_document(document)
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__} where its sections belong")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not the state of a checkpoint ({error}); get the checkpoint anew from where it was saved"
        ) from error
    return document


@contextmanager
def _write_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            raise CheckpointError(
                f"{folder}: no room for {what} ({free:,} free); earlier "
                "checkpoints are intact; free space, lower checkpoint.keep or move training.run"
            ) from error
        raise CheckpointError(
            f"{error.filename or folder}: saving {what} failed ({error.strerror}); "
            "earlier checkpoints are intact; make the folder writable, or put training.run elsewhere"
        ) from error


@contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}); make it readable"
        ) from error
