"""Writes a snapshot to files in a folder: every rank's tensors, what rank 0 writes for all, and their checksums."""

import errno
import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmoe.checkpoint.files import CheckedFileSystem, sync_folder
from mmoe.checkpoint.manifest import FORMAT, MANIFEST, Manifest
from mmoe.checkpoint.snapshot import Snapshot
from mmoe.checkpoint.tensors import union, write_tensors
from mmoe.checkpoint.tree import merge_trees
from mmoe.errors import CheckpointError
from mmoe.runtime.agreement import ProcessGroupRanks


def write(partial: Path, snapshot: Snapshot, documents: list[Any], ranks: ProcessGroupRanks) -> None:
    """Write the `snapshot` of every rank into the new folder `partial`; its manifest comes last.

    `documents` are those of all ranks, on rank 0 (`Snapshot.gather`). All that was written is durable.
    """
    written = ranks.gather(write_tensors(partial, snapshot.tensors, ranks))
    ranks.first(lambda: _finish(partial, snapshot, documents, union(written)))


def check_room(partial: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `partial`; raises OSError (ENOSPC) where they do not."""
    if shutil.disk_usage(partial.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))


def _finish(partial: Path, snapshot: Snapshot, documents: list[Any], written: Mapping[str, tuple[int, int]]) -> None:
    """Write what rank 0 writes for all ranks."""
    for name, (size, _) in written.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise CheckpointError(
                f"{partial / name} was written by another rank and is not whole where rank 0 looks; "
                "put training.run on a file system that all ranks share"
            )
    files = CheckedFileSystem()
    for name, text in snapshot.texts.items():
        files.write(partial / name, text.encode())
    files.write(partial / "state.json", json.dumps(functools.reduce(merge_trees, documents)).encode())
    sums = {**written, **{path.name: sums for path, sums in files.written.items()}}
    files.write(partial / MANIFEST, Manifest(FORMAT, snapshot.step, sums).to_json().encode())
    sync_folder(partial)
