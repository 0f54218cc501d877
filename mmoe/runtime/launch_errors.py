"""Where a run of several processes says what went wrong: RUN/errors.jsonl for all of them, a log for each.

The terminal belongs to rank 0. Warnings of the others go to RUN/logs/rank-00003.log; the error that ends a process is
one line of RUN/errors.jsonl, whichever rank it is of, and goes to torchrun too, which prints one of them.
"""

import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from mmoe.errors import MmoeError

FAILED = "watch/failed"  # the key of the first failure of an attempt


class StoppedError(MmoeError):
    """A process that ends because the run hangs, another rank failed, or torchrun is gone."""


def restart_count() -> int:
    """How often torchrun has restarted the processes of this run after an error (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def name_ranks(ranks: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def first_failure(store: dist.Store, rank: int, error: BaseException, killed: str = "") -> str | None:
    """Tell all ranks that share `store` of an `error` of this one; gives what failed before it, if anything did.

    `killed` is a failure of ranks that cannot speak, of which the error is the consequence.
    """
    own = f"rank {rank} failed: {type(error).__name__}: {error}"
    with suppress(dist.DistError):  # the store may be gone with what made the error
        first = store.compare_set(FAILED, "", killed or own).decode()
        return None if first == own else first
    return None


def record_error(
    folder: Path, rank: int, error: BaseException, *, step: int | None = None, after: str | None = None
) -> None:
    """Add `error` to `folder`/errors.jsonl; `after` says which failure of another rank it follows from.

    torchrun is told the cause too: it prints what the first process says that it sees end, not the first to fail.
    One write to a file opened for appending: lines of ranks that fail together do not mix on a local disk.
    """
    trace = "".join(traceback.format_exception(error))
    message = str(error) if isinstance(error, MmoeError) else f"{type(error).__name__}: {error}"
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "rank": rank,
        "host": socket.gethostname(),
        "restart": restart_count(),
        "step": step,
        "error": type(error).__name__,
        "message": message,
        "after": after,
        "traceback": trace,
    }
    try:
        _append(folder / "errors.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as full:  # which must not hide the error that is to be told
        print(
            f"{folder / 'errors.jsonl'} cannot be written ({full.strerror}): rank {rank}: {message}",
            file=sys.stderr,
        )
    shown = message if isinstance(error, MmoeError) else trace
    _tell_torchrun(shown if after is None else f"{after}; {folder / 'errors.jsonl'} has the errors of all ranks")


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode(errors="backslashreplace"))
    finally:
        os.close(descriptor)


def _tell_torchrun(text: str) -> None:
    """Write the file that torchrun reads once this process has ended, in the form of its own `ErrorHandler`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")


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
            _append(self.path, line)
        except OSError as full:  # a warning must not end the run
            print(f"{self.path} cannot be written ({full.strerror}): {line}", end="", file=sys.stderr)


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Warnings (of Python and of `logging`) go to `folder`/logs/rank-00003.log; rank 0 keeps the terminal.

    torch's own loggers are left alone: they write to stderr, and every line of theirs names its rank.
    """
    if rank == 0:
        yield
        return
    handler = _RankLog(folder / "logs" / f"rank-{rank:05d}.log")
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
