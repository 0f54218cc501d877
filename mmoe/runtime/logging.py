"""Routes what the rooms say through `logging`: the terminal is rank 0's, the others have a file each.

A room says things by ``logging.getLogger(__name__)``: INFO for whoever watches, WARNING for what may need an act.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Show = Callable[[str, int], None]  # prints a message of a level


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this run after an error (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def set_up_logging(show: Show) -> None:
    """Show what mmoe says on this process's terminal, by `show`; a second call replaces the first."""
    logger = logging.getLogger("mmoe")
    for handler in _terminals(logger):
        logger.removeHandler(handler)
    logger.addHandler(_Terminal(show))
    logger.setLevel(logging.INFO)


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Warnings (of Python and of `logging`) go to `folder`/logs/rank-00003.log; rank 0 keeps the terminal.

    torch's own loggers are left alone: they write to stderr, and every line of theirs names its rank.
    """
    if rank == 0:
        yield
        return
    root, own = logging.getLogger(), logging.getLogger("mmoe")
    silenced, handler = _terminals(own), _RankLog(folder / "logs" / f"rank-{rank:05d}.log")
    for terminal in silenced:
        own.removeHandler(terminal)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        for terminal in silenced:
            own.addHandler(terminal)


def append(path: Path, lines: str) -> None:
    """Add lines by one write: those of ranks that write together do not mix on a local disk.

    A line that a killed process has left unfinished ends before them, and spoils none of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        rest = memoryview((b"\n" if torn else b"") + lines.encode(errors="backslashreplace"))
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


class _Terminal(logging.Handler):
    def __init__(self, show: Show) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; what the terminal refuses (a full disk, a closed pipe) ends the command as any print."""
        self.show(self.format(record), record.levelno)


class _RankLog(logging.Handler):
    """Warnings and errors of one rank in a file that exists only once there are any.

    Every record opens the file anew: `--fresh` deletes the folder it lies in after logging has begun.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path
        self.setFormatter(
            logging.Formatter(f"%(asctime)s restart {restart_count()} %(levelname)s %(name)s %(message)s")
        )

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        try:
            append(self.path, line)
        except OSError as full:  # a warning must not end the run
            print(f"{self.path} cannot be written ({full.strerror}): {line}", end="", file=sys.stderr)


def _terminals(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if isinstance(handler, _Terminal)]
