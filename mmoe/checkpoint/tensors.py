"""Writes the tensors of a checkpoint by all ranks together, and fills them in under any layout."""

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mmoe.checkpoint.files import CheckedFileSystem
from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.metadata import CheckedReader, placed_tensors
from mmoe.checkpoint.tree import join_tree, select_paths, split_tree, tensor_paths
from mmoe.checkpoint.upgrade import upgrade_document
from mmoe.errors import CheckpointError
from mmoe.runtime.agreement import ProcessGroupRanks

TensorSpec = tuple[tuple[int, ...], torch.dtype]  # of a tensor: its global shape and dtype
# What torch raises for files that are not what `.metadata` says of them.
_WRONG = (
    RuntimeError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)


def union(parts: Iterable[dict]) -> dict:
    """Join several dicts into one; of a key that several have, the last value counts."""
    return {key: value for part in parts for key, value in part.items()}


def write_tensors(partial: Path, tensors: Mapping[str, Tensor], ranks: ProcessGroupRanks) -> dict[str, tuple[int, int]]:
    """Write this rank's share of `tensors` into the folder `partial`, together with all `ranks`.

    Returns (size in bytes, CRC-32) of this rank's files by name.
    """
    # The file system makes each file durable as it is closed, so torch need not.
    writer = dcp.FileSystemWriter(partial, sync_files=False, overwrite=False)
    writer.fs = files = CheckedFileSystem()
    with _single_process(), _unwrapped(ranks):
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=not ranks.grouped)
    return {path.name: sums for path, sums in files.written.items()}


def fill_state(
    folder: Path, manifest: Manifest, document: Any, state: dict[str, Any], ranks: ProcessGroupRanks
) -> None:
    """Fill `state` with its sections of the checkpoint in `folder`, whose ``state.json`` holds `document`."""
    document = upgrade_document(document, manifest.format)
    given = ranks.every(lambda: _tensors(folder, document, state))
    stored = tensor_paths(document)
    if manifest.format == 1:  # a parameter without a gradient had no state: this run's is the initial one
        given = {name: given[name] for name in given if name in stored or not name.startswith("optimizer.")}
    reader = CheckedReader(folder, {name: size for name, (size, _) in manifest.files.items()})
    saved = ranks.every(lambda: placed_tensors(reader.read_metadata()))
    if nowhere := sorted(set(stored.values()) - saved.keys()):
        raise CheckpointError(f"{folder}/state.json refers to {nowhere[0]!r}, a tensor that {folder}/.metadata lacks")
    forms = ranks.gather({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()})
    theirs = {name: (tuple(saved[key].size), saved[key].properties.dtype) for name, key in stored.items()}
    sharded = ranks.first(lambda: {part for part in document if _match(folder, part, union(forms), theirs)})
    for part in state.keys() - sharded:
        given |= {
            name: torch.empty(theirs[name][0], dtype=theirs[name][1]) for name in tensor_paths(document[part], part)
        }
    tensors = {stored[name]: tensor for name, tensor in given.items()}
    with _single_process(), _read(folder), _unwrapped(ranks):
        dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=not ranks.grouped)
    state.update(join_tree(select_paths({part: document[part] for part in state}, tensors.keys()), tensors))


def _tensors(folder: Path, document: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `state`; raises CheckpointError where `document` lacks one of its sections."""
    if missing := state.keys() - document.keys():
        raise CheckpointError(f"{folder}/state.json has no {sorted(missing)[0]!r}; it was saved by another program")
    return split_tree(state)[1]


def _match(folder: Path, section: str, ours: dict[str, TensorSpec], theirs: dict[str, TensorSpec]) -> bool:
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
def _read(folder: Path) -> Iterator[None]:
    """Name the checkpoint whose files have the right checksums and are no tensors as `.metadata` places them."""
    try:
        yield
    except (CheckpointError, dist.DistError):
        raise
    except _WRONG as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{folder}: its .distcp files are not the tensors that .metadata places in them ({why}); get the "
            "checkpoint anew from where it was saved"
        ) from error


@contextmanager
def _unwrapped(ranks: ProcessGroupRanks) -> Iterator[None]:
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
