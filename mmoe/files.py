"""Files that are whole or not there, written aside and renamed into place; and what is near one that is missing."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from uuid import uuid4

from mmoe.errors import OutputError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part of it.

    A string is written as UTF-8. Raises OSError, and then the file is as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


_MOST_SIBLINGS = 10_000  # that a name is compared with


def said_nearest(path: str | Path) -> str:
    """Say in parentheses what exists nearest to a missing path: a name like it beside it, else the folder above."""
    missing = Path(os.path.abspath(path))
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_SIBLINGS)]
    except OSError:  # it may not be listed
        names = []
    near = difflib.get_close_matches(missing.name, names, n=1)
    found = missing.parent / near[0] if near else missing.parent
    return f" (the nearest that exists is {found if os.path.isabs(path) else os.path.relpath(found)})"


@contextmanager
def writes(path: str | Path, rest: str = "") -> Iterator[None]:
    """Raise OutputError naming `path` where the file system does not let it be written.

    `rest` says what became of the rest.
    """
    try:
        yield
    except OSError as error:
        more = f"; {rest}" if rest else ""
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}){more}; free space on its disk, or make it and its "
            "folder writable, and give the same command again"
        ) from error
