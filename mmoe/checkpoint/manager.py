"""Saves and loads checkpoints of a run in any layout: written beside the old ones and renamed into place.

::

    checkpoints/step-00000100/manifest.json every other file with its size and CRC-32
                              config.yaml   the run's, as it was then
                              state.json    all that is not a tensor
                              .metadata     } torch.distributed.checkpoint: the tensors, by name,
                              __0_0.distcp  } in one file of every rank

What stands beside such a folder, and why no crash loses one: `mmoe.checkpoint.commit`. A run that continues from an
older one (because it was told to, or because the newer ones are damaged) first sets the newer ones aside, and so has
one course only.

All ranks save and load together, in a folder that they share. Tensors are plain or DTensors; several ranks may hold a
name, as shards or as equal copies, and a rank (of a pipeline) only some of the names. What was saved under one layout
loads under any other, one process included. All that is not a tensor is rank 0's, random states included: they differ
between ranks, but every training step seeds itself.

Nothing in a checkpoint is run: see `mmoe.checkpoint.metadata` on the pickle in which torch keeps `.metadata`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmoe.checkpoint.commit import PARTIAL, clean, commit, committed, go_back, latest, path_of
from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.files import check, read_errors, write_errors
from mmoe.checkpoint.group import checkpoint_ranks
from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.reader import STATE, find_whole, read_document
from mmoe.checkpoint.retention import retire
from mmoe.checkpoint.snapshot import Snapshot
from mmoe.checkpoint.tensors import fill_state
from mmoe.checkpoint.writer import check_room, write
from mmoe.errors import CheckpointError
from mmoe.runtime.agreement import ProcessGroupRanks

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and loads the states of a run (`mmoe.checkpoint.tree`) under `folder`; every failure is a CheckpointError.

    `latest_step`, `save`, `load` and `go_back` are for all ranks at once, which speak over a group of their own: what
    fails on one raises on all. The rest is for any one process.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        self.folder, self.config = Path(folder), config

    def steps(self) -> list[int]:
        """Return the steps of the committed checkpoints, ascending."""
        return sorted(committed(self.folder))

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, the same on all ranks, or None where nothing was saved yet.

        Raises CheckpointError where all the checkpoints there are were set aside.
        """
        # Rank 0's answer: what other machines see of a shared folder may be some seconds old.
        return checkpoint_ranks().first(lambda: latest(self.folder))

    def save(self, step: int, state: dict[str, Any], texts: Mapping[str, str] | None = None) -> Path:
        """Write `state` as the checkpoint of `step`, and `texts` (content by name) as files in it; returns its folder.

        An older checkpoint of that step is replaced. When anything fails, what was there before is left as it was,
        and the part that was written is removed.
        """
        ranks = checkpoint_ranks()
        return self._write(ranks.every(lambda: Snapshot.take(step, state, texts or {})), ranks)

    def load(self, state: dict[str, Any], step: int | None = None, accept: Callable[[int], None] | None = None) -> int:
        """Fill `state` from the checkpoint of `step` (None: the newest that is whole) and return its step.

        `accept` is told of the step that was found, before anything is filled, on all ranks; what it raises is raised.
        Damaged ones that are passed over are said on stderr. The keys of `state` choose the sections to read. A
        tensor of `state` is filled in place and must have the name, shape and dtype of the saved one; all ranks
        together hold all names of a section. A section without tensors on any rank takes whatever was saved, on
        the CPU. Everything that is not a tensor is replaced.
        """
        ranks = checkpoint_ranks()
        path, manifest = find_whole(self.folder, step, ranks)
        if accept is not None:
            accept(manifest.step)
        with read_errors(path):
            document = ranks.first(lambda: read_document(path))
            fill_state(path, manifest, document, state, ranks)
        return manifest.step

    def go_back(self, step: int) -> None:
        """Make the checkpoint of `step` the newest by setting aside all newer ones, which the run has left.

        What is set aside is not loaded, and retention counts it as older than all else. Does nothing where nothing is
        newer.
        """
        with write_errors(self.folder, "the names of checkpoints that are set aside"):
            checkpoint_ranks().first(lambda: go_back(self.folder, step))

    def text(self, name: str) -> tuple[Path, str] | None:
        """Return path and content of the text file `name` in the newest checkpoint that has it whole; None without one.

        One process alone may call this; `name` is one of the `texts` that `save` was given.
        """
        for _, path in sorted(committed(self.folder).items(), reverse=True):
            try:
                check(path / name, *Manifest.read(path).files[name])
                return path / name, (path / name).read_text(encoding="utf-8")
            except (CheckpointError, KeyError, OSError):
                continue
        return None

    def document(self) -> dict[str, Any] | None:
        """Return what is no tensor of the newest checkpoint that has that whole, as it was written; None without one.

        One process alone may call this. Raises CheckpointError where it is not such a document.
        """
        found = self.text(STATE)
        return None if found is None else read_document(found[0].parent)

    def _write(self, snapshot: Snapshot, ranks: ProcessGroupRanks) -> Path:
        """Write and commit `snapshot`, and delete what is not kept beside it; returns its folder."""
        partial = path_of(self.folder, snapshot.step, PARTIAL)
        held = snapshot.gather(ranks)
        with write_errors(self.folder, f"a checkpoint of {held.size:,} bytes"):
            ranks.first(lambda: self._prepare(partial, held.size))
            try:
                write(partial, snapshot, held.documents, ranks)
                ranks.first(lambda: commit(partial))
            except BaseException:
                if ranks.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        ranks.first(lambda: self._retire(snapshot.step))
        return path_of(self.folder, snapshot.step)

    def _retire(self, saved: int) -> None:
        """Delete what is not kept. Where that fails the new one is whole all the same, and the next save tries."""
        try:
            retire(self.folder, self.config.keep, saved)
        except OSError as error:
            logger.warning(
                f"{error.filename or self.folder}: an old checkpoint cannot be deleted ({error.strerror}); more than "
                f"checkpoint.keep={self.config.keep} stay until it can be"
            )

    def _prepare(self, partial: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        check_room(partial, needed)
