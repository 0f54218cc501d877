"""Finds and reads files of a folder that somebody else filled: which there are, what they may be called, their bytes.

Only regular files are opened (a FIFO would wait for ever, a device never end), and no more of them is read than the
bounds allow. Names that begin with a dot are hidden on purpose, and no reader looks at them. What a reader has no use
for is not passed over in silence: `pass_over` writes it into the list of what was refused.
"""

import io
import os
import stat
from collections.abc import Iterable
from os.path import splitext
from pathlib import Path

from mmoe.preparation.sources.base import Refuse, Refused
from mmoe.schema.bounds import bounds, check_bound

OTHER_KIND = "file of another kind"
_OUTSIDE = ("/", "../")  # with which the path of a file begins that is not in the folder


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; raise OSError for anything else, and for a name that no file can have."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # first: opening some devices does something
            raise OSError(0, "it is no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a name with a NUL, or with what no file system can spell
        raise OSError(0, f"no file can have this name: {error}") from error
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(0, "it is no regular file")
    return file


def read_regular(path: Path) -> bytes:
    """Read the bytes of a regular file; raise OSError, and `Refused` where they are more than the bounds allow."""
    with open_regular(path) as file:
        check_bound("file_bytes", os.fstat(file.fileno()).st_size, str(path), "has too many bytes")
        data = file.read(bounds().file_bytes + 1)  # what a kernel makes up states no size
    check_bound("file_bytes", len(data), str(path), "has too many bytes")
    return data


def read_bytes(path: Path, where: str) -> bytes:
    """Read the bytes of the file that `where` names in messages; raise `Refused` where they cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}), named by {where}; restore the file or remove the line"
        raise Refused("missing file", message) from error


def check_name(name: str, where: str) -> None:
    """Refuse a name that UTF-8 cannot spell: it would be the key of a sample, in tars, tables and messages."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = name.encode("utf-8", "backslashreplace").decode()
        message = f"{where}: the name {shown} is not UTF-8 at character {error.start}; rename the file or recording"
        raise Refused("name is not UTF-8", message) from error


def listing(root: Path, quarantine: Refuse) -> list[Path]:
    """List the regular files below `root` that are not hidden, sorted; refuse others, and names out of UTF-8."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Only folders behind links are not walked into: a link to what holds it would never end.
        links = [name for name in folders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114  # false, not an error
        found += [Path(folder, name) for name in links + names if not name.startswith(".")]
    files = []
    for path in sorted(found):
        name = path.relative_to(root).as_posix()
        try:
            check_name(name, str(root))
            if not path.is_file():
                message = f"{path} is no regular file (a link to a folder or to nothing, a FIFO, a device); copy it"
                raise Refused("no regular file", message)
        except Refused as refusal:
            quarantine(name, refusal)
            continue
        files.append(path)
    return files


def below(root: Path, name: str) -> str:
    """Return the path `name`, normalized, relative to `root` where it lies below it, else as it is given."""
    if not name.startswith(_OUTSIDE):
        return name
    top = os.path.abspath(root)  # noqa: PTH100  # links are names like others
    place = os.path.normpath(os.path.join(top, name))  # noqa: PTH118  # which an absolute name replaces
    return place[len(top) + 1 :] if place.startswith(f"{top}/") else name


class FileKeys:
    """Gives every sample that is made of a file a key of its own, whatever their names have in common.

    A key is the path without its suffix. Where that is another file's (``a.jpg``, ``a.png``) it keeps the suffix, and
    where the file itself came before (an image has several captions) it gets a number. WebDataset would cut a key at
    the first dot of its last part: there a dot is written ``%2E``, and a percent sign ``%25``.
    """

    def __init__(self) -> None:
        self._own: dict[str, str] = {}  # by path
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}  # number to try, by key
        self._cells: dict[Path, str] = {}  # by what a cell says its file was called

    def key(self, name: str) -> tuple[str, str]:
        """Return the key of the next sample of the file `name`, a path, and that of the file, its first."""
        if name not in self._own:
            stem = _safe(splitext(name)[0])  # noqa: PTH122  # its rule for dots: keys stay what they were
            self._own[name] = self.free(_safe(name) if stem in self._taken else stem)
            return self._own[name], self._own[name]
        return self.free(self._own[name]), self._own[name]

    def row_key(self, row: str, name: str) -> tuple[str, str]:
        """Return the key and the recording of a row's sample, which is made of the file `name`, as `below` has it.

        They are those of the file, but for one outside of the folder: its path is no key, so that the key is the `row`.
        """
        return (self.free(row), name) if name.startswith(_OUTSIDE) else self.key(name)

    def cell_key(self, key: str, file: Path | None) -> tuple[str, str]:
        """Return the key of a sample made of a cell, and that of the first cell with its `file` (None: its own)."""
        found = self.free(key)
        return found, found if file is None else self._cells.setdefault(file, found)

    def free(self, key: str) -> str:
        """Take `key`, or where a sample has it the first of ``key+2``, ``key+3``, ... that none has."""
        found = key
        while found in self._taken:
            number = self._next.setdefault(key, 2)
            self._next[key], found = number + 1, f"{key}+{number}"
        self._taken.add(found)
        return found


def _safe(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def pass_over(files: Iterable[Path], root: Path, wanted: str, quarantine: Refuse) -> None:
    """Write down files that a reader has no use for; `wanted` says what it reads."""
    for file in files:
        message = f"{file} is not read: this kind of source reads {wanted}; convert it, or take it out of the folder"
        quarantine(file.relative_to(root).as_posix(), Refused(OTHER_KIND, message))
