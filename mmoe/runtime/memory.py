"""What memory this machine has, and what of it is free."""

from pathlib import Path

import psutil

_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of either hierarchy


def total_memory() -> int:
    """Bytes of memory: the machine's, or the container's limit where that is lower."""
    total = psutil.virtual_memory().total
    for limit in _CONTAINERS:
        if (found := _number(limit)) is not None:
            return min(total, found)
    return total


def free_memory() -> int:
    """Bytes that processes may still take, as far as the machine tells; never more than `total_memory`."""
    return min(psutil.virtual_memory().available, total_memory())


def in_gib(size: int) -> str:
    """Write a size in bytes for people, in GiB."""
    return f"{size / 2**30:,.1f} GiB"


def _number(path: str) -> int | None:
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None
