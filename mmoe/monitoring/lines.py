"""A file of lines that grows while a run trains, and never has a part of a line for long."""

import os
from contextlib import suppress
from pathlib import Path

from mmoe.files import writes

_BLOCK = 1 << 16


class LineFile:
    """Appends lines to `path`; opening it cuts off the part of a line that a killed process has left at its end.

    A line that cannot be written is kept in `pending`, and comes before the next one. Raises OutputError.
    """

    def __init__(self, path: Path, pending: list[str]) -> None:
        self.path, self.pending = path, pending
        with writes(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with writes(path):
            self._cut(_end_of_lines(self._descriptor))
            self._flush()

    def write(self, line: str) -> None:
        """Append `line`, which has no line break."""
        self.pending.append(line)
        with writes(self.path, "its records are kept in the checkpoint and written when the run goes on"):
            self._flush()

    def close(self) -> None:
        """Close the file; what is pending stays pending."""
        os.close(self._descriptor)

    def _flush(self) -> None:
        before = os.fstat(self._descriptor).st_size
        rest = memoryview("".join(f"{line}\n" for line in self.pending).encode())
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # of what is no file on a disk
                self._cut(before)
            raise
        self.pending.clear()

    def _cut(self, size: int) -> None:
        if os.fstat(self._descriptor).st_size > size:
            os.ftruncate(self._descriptor, size)


def _end_of_lines(descriptor: int) -> int:
    """Where the last whole line of the file ends."""
    stop = os.fstat(descriptor).st_size
    while stop > 0:
        start = max(stop - _BLOCK, 0)
        found = os.pread(descriptor, stop - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0
