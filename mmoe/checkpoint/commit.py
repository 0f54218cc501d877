"""Names a run's checkpoints, and renames them in an order in which no crash loses one.

::

    step-00000100/           committed: whole when its files are those of its manifest
    step-00000200.partial/   being written, or left by a crash: never read, removed by `clean`
    step-00000100.replaced/  the older checkpoint of a step, until the newer one is in place
    step-00000300.left/      set aside by `go_back`: the run went on from an older one

Nothing points to a committed checkpoint, and the newest one is the one of the highest step. What is written here one
process writes at a time: rank 0.
"""

import shutil
from pathlib import Path

from mmoe.checkpoint.files import sync_folder
from mmoe.errors import CheckpointError

PARTIAL, REPLACED, LEFT = ".partial", ".replaced", ".left"
POINTER = "latest"  # of format 2, which named the newest checkpoint in it


def path_of(folder: Path, step: int, suffix: str = "") -> Path:
    """Return the path of the checkpoint of `step` in `folder`.

    `suffix` (`PARTIAL`, `REPLACED`, `LEFT`) names what that checkpoint is before or after it is committed.
    """
    return folder / f"step-{step:08d}{suffix}"


def committed(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints of `folder` by step; a replaced one counts until the newer one is in place."""
    folders = _folders(folder)
    found = {_step_of(path.name.removesuffix(REPLACED)): path for path in folders if path.name.endswith(REPLACED)}
    found |= {_step_of(path.name): path for path in folders}
    return {step: path for step, path in found.items() if step is not None}


def set_aside(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder` that the run has left (`go_back`), the oldest first."""
    return sorted(path for path in _folders(folder) if path.name.endswith(LEFT))


def latest(folder: Path) -> int | None:
    """Return the step of the newest committed checkpoint in `folder`, or None where nothing was saved yet.

    Raises CheckpointError where all the checkpoints there are were set aside.
    """
    if found := committed(folder):
        return max(found)
    if left := set_aside(folder):
        raise CheckpointError(
            f"{folder} holds no checkpoint but {', '.join(path.name for path in left)}, which the run had left; remove "
            f"{LEFT} from the name of the one to resume from, or start over with --fresh"
        )
    return None


def clean(folder: Path) -> None:
    """Undo what a crash left half done in `folder`: partial checkpoints, replaced ones and unfinished deletions."""
    for path in folder.iterdir():
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


def commit(partial: Path) -> None:
    """Rename the written folder `partial` into place, durably; delete an older checkpoint of its step after that."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)  # from here on it is found
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def go_back(folder: Path, step: int) -> None:
    """Set aside the checkpoints in `folder` that are newer than `step`."""
    # The oldest first: until the last is renamed, a run that was killed here resumes where it stood.
    for newer, path in sorted(committed(folder).items()):
        if newer <= step:
            continue
        left = path_of(folder, newer, LEFT)
        if left.exists():
            delete(left)
        path.rename(left)
    if folder.is_dir():
        sync_folder(folder)


def delete(path: Path) -> None:
    """Delete the checkpoint `path`; where a crash ends the deletion, what is left does not count as a checkpoint."""
    doomed = path.with_name(path.name + PARTIAL)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdecimal() else None


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
