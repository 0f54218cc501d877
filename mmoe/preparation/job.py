"""Keeps a preparation as a job that survives its process, in a folder that holds it until it is done.

The folder ``.<output>.unfinished`` beside the output holds `job.json`, which pins all that the result follows from,
and a folder for every finished unit of work (`chunks.py`). The same command finds them there and goes on; another one
is refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmoe.config.load import flatten
from mmoe.errors import DataError
from mmoe.files import write_atomically
from mmoe.hashing import blake2b, framed
from mmoe.preparation.sources.base import Item

JOB_FORMAT = 2  # of all that is stored in an unfinished preparation
JOB = "job.json"
_LOCK = "lock"
_ASSEMBLING = "assembling"


class Job:
    """Holds the folder of an unfinished preparation for one process at a time.

    Leaving the context by an exception keeps it, so that the same command goes on from there.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.unfinished")
        self.result = self.folder / "output"  # becomes the output

    def __enter__(self) -> "Job":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"another process prepares {self.output}; wait for it, or name another folder") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def restart(self) -> None:
        """Forget what an earlier process has done."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def pin(self, pins: dict[str, Any]) -> bool:
        """Begin this job, or find that an earlier process has begun it; return True in the latter case.

        `pins` are all that the result follows from. Raises DataError where an earlier process began another job.
        """
        path = self.folder / JOB
        pins = json.loads(json.dumps(pins))
        if not path.is_file():
            self.restart()
            write_atomically(path, json.dumps(pins, indent=1))
            return False
        before = flatten(json.loads(path.read_text()))
        now = flatten(pins)
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            said = "; ".join(_said(key, before.get(key), now.get(key)) for key in changed)
            raise DataError(
                f"{self.folder} holds an unfinished preparation of something else ({said}); give it as before to go "
                "on, or delete that folder to start over, as mmoe prepare --fresh does"
            )
        return True

    def remember(self, name: str, make: Any) -> Any:
        """Return what an earlier process remembered under this name, else the JSON value that `make()` gives now."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_atomically(path, json.dumps(make(), indent=1))
        return json.loads(path.read_text())

    def begin_again(self, name: str, value: Any) -> None:
        """Forget what has been finished, but not which job it is, and remember this value in its place."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_LOCK, JOB):
                path.unlink()
        write_atomically(self.folder / f"{name}.json", json.dumps(value, indent=1))

    def begin_assembly(self) -> None:
        """Write down that from here on the shards of finished units move away."""
        (self.folder / _ASSEMBLING).touch()

    @property
    def assembling(self) -> bool:
        """True if the assembly has begun, so that shards may have moved away."""
        return (self.folder / _ASSEMBLING).exists()

    def finish(self) -> None:
        """Give the result the name of the output, and delete the folder."""
        self.result.rename(self.output)
        self.discard()

    def discard(self) -> None:
        """Delete the folder with all that is finished."""
        shutil.rmtree(self.folder)


def listing_digest(items: Iterable[Item], input: Path | None, leave_out: tuple[Path, ...] = ()) -> str:
    """Return a digest of what the reader lists and of the files that it reads.

    Of every file at or under `input`, but those under `leave_out`, size and time count.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.key, item.recording, item.start, item.stop, item.rank]).encode())
    if input is None:
        return digest.hexdigest()
    passed = {path.resolve() for path in leave_out}
    for folder, folders, files in os.walk(input):
        folders[:] = sorted(name for name in folders if (Path(folder) / name).resolve() not in passed)
        for name in sorted(files):
            _add_file(digest, Path(folder, name))
    if input.is_file():
        _add_file(digest, input)
    return digest.hexdigest()


def names_digest(names: Iterable[str]) -> str:
    """Return a digest of a set of names."""
    return blake2b(framed(name.encode() for name in sorted(names)), 16).hex()


def _add_file(digest: Any, path: Path) -> None:
    try:
        stat = path.stat()
    except OSError:  # a dangling link; the reader says so where it matters
        return
    digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))


def _said(key: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64:  # digests
        return f"the {key} has changed"
    return f"{key} was {json.dumps(before)}, is now {json.dumps(now)}"
