"""Writes what went wrong in a run of several processes to RUN/errors.jsonl, for all of them.

The error that ends a process is one line of RUN/errors.jsonl, whichever rank it is of, and goes to torchrun too, which
prints one of them. Warnings go where `mmoe.runtime.logging` says.
"""

import json
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from mmoe.errors import MmoeError
from mmoe.runtime.logging import append, restart_count

FAILED = "failed"  # the key of the first failure that ended a process of an attempt


class StoppedError(MmoeError):
    """Ends a process because the run hangs, another rank failed, or torchrun is gone."""


def name_ranks(ranks: list[int]) -> str:
    """Name ranks briefly: ``[0, 1, 2, 5]`` as ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def first_failure(store: dist.Store, key: str, rank: int, error: BaseException, before: str = "") -> str | None:
    """Tell all ranks that look at `key` of `store` of an `error` of this one; gives what failed before it, if any did.

    `before` is an earlier failure that is known here, of which the error is the consequence.
    """
    own = f"rank {rank} failed: {type(error).__name__}: {error}"
    with suppress(dist.DistError):  # the store may be gone with what made the error
        first = store.compare_set(key, "", before or own).decode()
        return None if first == own else first
    return None


def record_error(
    folder: Path, rank: int, error: BaseException, *, step: int | None = None, after: str | None = None
) -> None:
    """Add `error` to `folder`/errors.jsonl; `after` says which failure of another rank it follows from.

    torchrun is told the cause too: it prints what the first process says that it sees end, not the first to fail.
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
        append(folder / "errors.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as full:  # which must not hide the error that is to be told
        print(
            f"{folder / 'errors.jsonl'} cannot be written ({full.strerror}): rank {rank}: {message}",
            file=sys.stderr,
        )
    shown = message if isinstance(error, MmoeError) else trace
    _tell_torchrun(shown if after is None else f"{after}; {folder / 'errors.jsonl'} has the errors of all ranks")


def _tell_torchrun(text: str) -> None:
    """Write the file that torchrun reads once this process has ended, in the form of its own `ErrorHandler`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
