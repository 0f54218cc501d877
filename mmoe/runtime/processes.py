"""Finds the processes of this machine, as Linux shows them under /proc."""

import os
from contextlib import suppress
from pathlib import Path


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
