"""Files that are whole or not there, written aside and renamed into place; and what is near one that is missing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from uuid import uuid4

from mmoe.addresses import local_path
from mmoe.errors import DataError, MissingFileError, OutputError, near_name

Read = Callable[[str, str], bytes]
"""Reads a whole file by its address; the second argument says what it is, for messages. `read_file` or a storage's."""


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


_BUFFERED = 16 << 20  # bytes from which reading through a buffer costs nothing
_MOST_SIBLINGS = 10_000  # that a name is compared with


def said_nearest(path: str | Path) -> str:
    """Say in parentheses what exists nearest to a missing path: a name like it beside it, else the folder above."""
    missing = Path(os.path.abspath(path))  # noqa: PTH100  # links are not followed: the user does not know their ends
    while not os.path.isdir(missing.parent):  # noqa: PTH112  # false, not an error, where it may not be looked at
        missing = missing.parent
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_SIBLINGS)]
    except OSError:  # it may not be listed
        names = []
    near = near_name(missing.name, names)
    found = missing.parent / near if near else missing.parent
    return f" (the nearest that exists is {found if Path(path).is_absolute() else os.path.relpath(found)})"


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


def read_file(url: str | Path, what: str = "", start: int = 0, stop: int | None = None) -> bytes:
    """Read a local file, or its bytes `start`..`stop`; `what` they are serves the messages.

    Raises DataError where it cannot be read or ends before, and for an address that is far away.
    """
    path = local_path(url)
    if path is None:
        raise DataError(f"{url} is far away, where only local files are read{lost(what)}; copy it here")
    try:
        buffering = 0 if stop is not None and stop - start < _BUFFERED else -1
        with open(path, "rb", buffering=buffering) as file:  # noqa: PTH123  # once for every member that is decoded
            file.seek(start)
            if stop is not None and stop > os.fstat(file.fileno()).st_size:  # asked before room is made for them
                raise truncated(str(url), stop, what)
            content = file.read(-1 if stop is None else stop - start)
    except OSError as error:
        raise local_error(str(url), error, what) from error
    if stop is not None and len(content) < stop - start:
        raise truncated(str(url), stop, what)
    return content


def local_error(url: str, error: OSError, what: str) -> DataError:
    """Say why a local file cannot be read, and so not `what` it holds; a missing one is a MissingFileError."""
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{url} does not exist{lost(what)}; restore it or prepare the source again")
    return DataError(f"{url} cannot be read ({error}){lost(what)}; restore it or prepare the source again")


def lost(what: str) -> str:
    """Say that `what` cannot be read therefore, as the end of a sentence; empty where nothing is named."""
    return f", so {what} cannot be read" if what else ""


def truncated(url: str, stop: int, what: str) -> DataError:
    """Say that a file ends before byte `stop`, up to which `what` is asked for."""
    return DataError(
        f"{url} is truncated: {what or 'what is asked for'} ends at byte {stop}, which the file does not reach; copy "
        "it again or prepare the source again"
    )
