"""Cache byte strings in a bounded folder on the node's own disk, shared by every process of the node."""

import fcntl
import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HEADER = struct.Struct("<4sIQ")  # what it is, CRC-32 and length of the content
_MAGIC = b"mmc1"
_TOTAL = struct.Struct("<Q")
_FILLED = 0.9  # eviction goes down to this share of the limit, so that the folder is not listed at every write
_ABANDONED_S = 3600


class ByteCache:
    """Keeps at most `limit` bytes in `folder`; what was used longest ago goes first.

    An entry is one file, written under another name and renamed, with its length and checksum in front: a reader
    sees a whole entry or none, and one that a crash of the machine left torn is dropped when it is met. The sum of
    all entries stands in a locked file. Beside the entries, every writing process holds at most one unfinished one.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._unfinished = self.folder / "unfinished"
        self._unfinished.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> bytes | None:
        """Return what is kept under `key`, None where there is nothing whole."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        if (content := _content(stored)) is None:
            path.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):  # evicted by another process since it was read
            _touch(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep `content`, unless it alone is larger than the limit."""
        size = _HEADER.size + len(content)
        if size > self.limit:
            return
        path, unfinished = self._path(key), self._unfinished / uuid.uuid4().hex
        path.parent.mkdir(exist_ok=True)
        try:  # not by `write_atomically`: syncing every entry would cost more than reading a torn one again
            unfinished.write_bytes(_HEADER.pack(_MAGIC, zlib.crc32(content), len(content)) + content)
            _touch(unfinished)
            with self._locked() as file:
                if path.exists():
                    return
                stated = file.read(_TOTAL.size)
                total = _TOTAL.unpack(stated)[0] if len(stated) == _TOTAL.size else self.limit
                if total + size > self.limit:
                    total = self._evict(min(self.limit - size, int(self.limit * _FILLED)))
                file.seek(0)
                file.write(_TOTAL.pack(total + size))  # before the rename: killed in between, it counts too much
                file.flush()
                unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _evict(self, goal: int) -> int:
        """Remove the entries used longest ago until at most `goal` bytes are left; returns how many are."""
        found = []
        for entry in self.folder.glob("??/*"):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue  # a torn entry that a reader dropped
            found.append((stat.st_mtime_ns, stat.st_size, entry))
        total = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found):
            if total <= goal:
                break
            entry.unlink(missing_ok=True)
            total -= size
        for left in self._unfinished.iterdir():  # by processes that were killed
            try:
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    left.unlink()
            except FileNotFoundError:
                pass
        return total

    @contextmanager
    def _locked(self) -> Iterator:
        descriptor = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, also when the process is killed
            yield file

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]


def _content(stored: bytes) -> bytes | None:
    if len(stored) < _HEADER.size:
        return None
    magic, checksum, length = _HEADER.unpack_from(stored)
    content = stored[_HEADER.size :]
    return content if (magic, length) == (_MAGIC, len(content)) and zlib.crc32(content) == checksum else None


def _touch(path: Path) -> None:
    """The time of last use, finer than the kernel's own stamps."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
