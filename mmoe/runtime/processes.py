"""Finds and ends the processes that this one has started, as Linux shows them under /proc, and its torchrun."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mmoe.runtime.logging import restart_count


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


def end_torchrun() -> None:
    """Have this machine's torchrun end instead of starting all processes again, which would meet the same error.

    torchrun starts again after any end but 0, whatever its code; SIGTERM is how it is told to end. The first of its
    processes that asks for it sends one: a second one would break into its closing.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of the attempt>/<process>/error.json
    if errors is None or restart_count() >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return
    with suppress(FileExistsError):
        (Path(errors).parents[1] / "ended").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGTERM)


def end_process(code: int) -> NoReturn:
    """End this process at once, from any thread, and its children first: `os._exit` would leave them behind."""
    try:
        for child in descendants():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    finally:
        os._exit(code)
