"""Chooses the checkpoint to load, the one that was asked for or the newest whole one, with every file of it checked."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mmoe.checkpoint.commit import LEFT, committed, latest, path_of
from mmoe.checkpoint.files import DamagedError, check, read_errors
from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.tree import check_document
from mmoe.errors import CheckpointError, ConfigError
from mmoe.runtime.agreement import ProcessGroupRanks

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATE = "state.json"  # of a checkpoint, all that is not a tensor


def find_whole(folder: Path, step: int | None, ranks: ProcessGroupRanks) -> tuple[Path, Manifest]:
    """Find the checkpoint of `step`, or (None) the newest whose files are all as they were written; all ranks agree.

    Damaged ones that are passed over are said on stderr. Raises ConfigError where there is none of `step`, and
    CheckpointError where none is whole.
    """
    damage: list[str] = []
    tried: set[Path] = set()
    while paths := ranks.first(lambda: [path for path in _candidates(folder, step) if path not in tried]):
        path = paths[0]
        tried.add(path)
        manifest, found = ranks.first(functools.partial(_attempt, path, Manifest.read, path))
        if manifest is not None:
            shared = list(manifest.files.items())[ranks.rank :: ranks.size]
            mine = ranks.every(functools.partial(_attempt, path, _check_all, path, shared))[1]
            found = ranks.first(functools.partial(next, filter(None, ranks.gather(mine)), None))
        if manifest is None or found is not None:
            damage.append(str(found))
            continue
        if damage and ranks.rank == 0:
            logger.warning(f"{'; '.join(damage)}: this goes on from {path.name} instead")
        return path, manifest
    raise CheckpointError(ranks.first(lambda: _none_whole(folder, step, damage)))


def read_document(path: Path) -> dict[str, Any]:
    """Read ``state.json`` at `path`, all of a checkpoint that is not a tensor.

    Raises CheckpointError where it is not such a document.
    """
    state = path / STATE
    try:
        document = json.loads(state.read_text(encoding="utf-8"))
        check_document(document)
        if not isinstance(document, dict):
            raise ValueError(f"a {type(document).__name__} where its sections belong")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{state} is not the state of a checkpoint ({error}); get the checkpoint anew from where it was saved"
        ) from error
    return document


def _candidates(folder: Path, step: int | None) -> list[Path]:
    """The checkpoints to try, in this order."""
    found = committed(folder)
    if step is None:
        if latest(folder) is None:
            raise CheckpointError(f"{folder} holds no checkpoint; train the run first")
        return [found[step] for step in sorted(found, reverse=True)]
    if step in found:
        return [found[step]]
    left = path_of(folder, step, LEFT)
    hint = f"; the run had left {left}: remove {LEFT} from its name to return to it" if left.is_dir() else ""
    choice = f"choose from {', '.join(map(str, sorted(found)))}" if found else "it holds none"
    raise ConfigError(f"{folder} holds no checkpoint of step {step}; {choice}{hint}")


def _none_whole(folder: Path, step: int | None, damage: list[str]) -> str:
    if step is None:
        more = f" (and {len(damage) - 1} older ones are damaged too)" if len(damage) > 1 else ""
        return (
            f"{damage[0]}{more}; no checkpoint of {folder} is whole to resume from: copy an earlier or this "
            "one again from where it is whole, or start over with --fresh"
        )
    others = ", ".join(str(other) for other in sorted(committed(folder)) if other != step)
    instead = f"resume from an earlier checkpoint (there are {others})" if others else "there is no other"
    return f"{damage[0]}; {instead}, or copy the file again from where it is whole"


def _check_all(path: Path, files: list[tuple[str, tuple[int, int]]]) -> None:
    for name, sums in files:
        check(path / name, *sums)


def _attempt(path: Path, act: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """What `act` returns, and what is damaged in `path` where it cannot."""
    try:
        with read_errors(path):
            return act(*arguments), None
    except DamagedError as error:
        return None, str(error)
