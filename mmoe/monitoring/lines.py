"""Keeps a file of lines that grows while a run trains, and never has a part of a line for long."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mmoe.files import writes

_BLOCK = 1 << 16


class LineFile:
    """Appends lines to `path`; opening it cuts off the part of a line that a killed process has left at its end.

    A line that cannot be written is kept in `pending`, and comes before the next one. Raises OutputError, which says
    what becomes of the `rest`.
    """

    def __init__(self, path: Path, rest: str) -> None:
        self.path, self.rest, self.pending = path, rest, list[str]()
        with writes(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with writes(path):
            self.cut(self._end_of_lines())

    def write(self, *lines: str) -> None:
        """Append `lines`, which have no line breaks; all of them, or none where the disk refuses one."""
        self.pending += lines
        with writes(self.path, self.rest):
            self._flush()

    @property
    def last(self) -> str | None:
        """The last line of the file; None where there is none."""
        return next((line for _, line in self.backwards()), None)

    def forwards(self, start: int) -> Iterator[tuple[int, str]]:
        """Yield (where the line ends, the line) from the line that begins at byte `start` to the last one."""
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                yield start, line.rstrip(b"\n").decode(errors="replace")

    def backwards(self) -> Iterator[tuple[int, str]]:
        """Yield (where the line begins, the line) from the last line to the first."""
        stop, rest = os.fstat(self._descriptor).st_size, b""  # `rest` is what is read of a line whose begin is not
        while stop > 0:
            start = max(stop - _BLOCK, 0)
            block = os.pread(self._descriptor, stop - start, start) + rest
            first, *lines = block.splitlines(keepends=True) if start else [b"", *block.splitlines(keepends=True)]
            place = start + len(block)
            for line in reversed(lines):
                place -= len(line)
                yield place, line.rstrip(b"\n").decode(errors="replace")
            stop, rest = start, first

    def cut(self, size: int) -> None:
        """Cut the file off after `size` bytes."""
        with writes(self.path):
            if os.fstat(self._descriptor).st_size > size:
                os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Wait until all lines that were written are on the disk."""
        with writes(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; lines that are pending stay pending."""
        os.close(self._descriptor)

    def _flush(self) -> None:
        before = os.fstat(self._descriptor).st_size
        rest = memoryview("".join(f"{line}\n" for line in self.pending).encode())
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # of what is no file on a disk
                self.cut(before)
            raise
        self.pending.clear()

    def _end_of_lines(self) -> int:
        """Where the last whole line of the file ends."""
        stop = os.fstat(self._descriptor).st_size
        while stop > 0:
            start = max(stop - _BLOCK, 0)
            found = os.pread(self._descriptor, stop - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            stop = start
        return 0
