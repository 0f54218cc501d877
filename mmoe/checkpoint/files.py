"""Writes files that are either whole or known to be broken: checksums on the way out, checks on the way in."""

import errno
import io
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from mmoe.errors import CheckpointError

BLOCK = 1 << 24


class CheckedFile(io.RawIOBase):
    """Writes a file front to back, durable once closed, and takes its size and CRC-32.

    Checkpoints do not use `write_atomically`: tensors are streamed, never whole in memory, and it is not a file that
    appears at once but the folder, when all ranks have written theirs.

    It remembers the first error of the disk (or Ctrl-C) instead of raising it in `write`: torch's zip writer
    turns an exception of its stream into a RuntimeError about file positions. Whoever closes the file asks
    `raise_failure` for the true one.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._failure: BaseException | None = None
        self.size = self.crc = 0

    def writable(self) -> bool:
        """Return True: torch asks whether a stream can be written to."""
        return True

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self.size

    def write(self, data: Any) -> int:
        """Write all of `data` and add it to size and checksum; an error of the disk is kept for `raise_failure`."""
        rest = view = memoryview(data).cast("B")
        self.size += len(view)
        self.crc = zlib.crc32(view, self.crc)
        while self._failure is None and len(rest):
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BaseException as failure:
                self._failure = failure
        return len(view)

    def close(self) -> None:
        """Make the file durable and close it; a second call does nothing."""
        if self.closed:
            return
        super().close()
        try:
            os.fsync(self._descriptor)
        except OSError as failure:
            self._failure = self._failure or failure
        finally:
            os.close(self._descriptor)

    def raise_failure(self) -> None:
        """Raise the first error that writing or closing met, if any."""
        if self._failure is not None:
            raise self._failure


class CheckedFileSystem(FileSystem):
    """Writes every file of torch's checkpoint writer as a `CheckedFile`.

    `written` holds (size, CRC-32) of every file, by its path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[Path, tuple[int, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """Open `path` for writing (``mode`` is ``wb``); the error of a failed write is raised when the context ends."""
        if mode != "wb":
            raise ValueError(f"{path}: a checkpoint's files are only written here, not opened as {mode}")
        with CheckedFile(Path(path)) as stream:
            try:
                yield stream
            finally:
                stream.close()
                stream.raise_failure()
        self.written[Path(path)] = (stream.size, stream.crc)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a written file; `written` then has it by its new path."""
        super().rename(path, new_path)
        self.written[Path(new_path)] = self.written.pop(Path(path))

    def write(self, path: Path, data: bytes) -> None:
        """Write a whole file, durably."""
        with self.create_stream(path, "wb") as stream:
            stream.write(data)


def sync_folder(folder: Path) -> None:
    """Make the names of the files in `folder` durable (fsync of the folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DamagedError(CheckpointError):
    """Says that a file of a checkpoint is missing or not as it was written; an older checkpoint may still be whole."""


def check(path: Path, size: int, crc: int) -> None:
    """Check that the file `path` exists with `size` bytes and the CRC-32 `crc`; raises DamagedError if it does not."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing from its checkpoint")
    found = path.stat().st_size
    if found != size:
        raise DamagedError(f"{path} is truncated: it has {found:,} bytes and was written with {size:,}")
    actual = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            actual = zlib.crc32(block, actual)
    if actual != crc:
        raise DamagedError(f"{path} is corrupt: its contents are not what was written")


@contextmanager
def write_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn an error of the disk, met while `what` is saved in `folder`, into a CheckpointError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            raise CheckpointError(
                f"{folder}: no room for {what} ({free:,} free); earlier "
                "checkpoints are intact; free space, lower checkpoint.keep or move training.run"
            ) from error
        raise CheckpointError(
            f"{error.filename or folder}: saving {what} failed ({error.strerror}); "
            "earlier checkpoints are intact; make the folder writable, or put training.run elsewhere"
        ) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an error of reading the checkpoint `path` into a CheckpointError; a failing disk becomes a DamagedError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"{error.filename or path} cannot be read ({error.strerror})") from error
        raise CheckpointError(
            f"{error.filename or path} cannot be read ({error.strerror}); make it readable"
        ) from error
