"""Finds the processes that this one has started, as Linux shows them under /proc, and ends them with it."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def descendants() -> list[int]:
    """List the ids of all processes that this one started, or that those started; parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it ended while we looked
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()  # behind the name: state, parent
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def end_process(code: int) -> NoReturn:
    """End this process at once, from any thread, and its children first: `os._exit` would leave them behind."""
    try:
        for child in descendants():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    finally:
        os._exit(code)
