"""Deletes the checkpoints that are not kept after a save."""

from pathlib import Path

from mmoe.checkpoint.commit import committed, delete, set_aside


def retire(folder: Path, keep: int, saved: int) -> None:
    """Delete all checkpoints in `folder` but the newest `keep`, those that were set aside first.

    The one of the step just `saved` stays, even where it is older than those: a run may begin anew beside others.
    """
    found = committed(folder)
    by_age = set_aside(folder) + [found[step] for step in sorted(found)]
    for path in by_age[:-keep]:
        if path != found[saved]:
            delete(path)
