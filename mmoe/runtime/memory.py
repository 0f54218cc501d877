"""Measures what memory this machine has, and what of it is free."""

import re
from pathlib import Path

_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of either hierarchy


def total_memory() -> int:
    """Return the bytes of memory: the machine's, or the container's limit where that is lower."""
    total = _meminfo("MemTotal")
    for limit in _CONTAINERS:
        if (found := _number(limit)) is not None:
            return min(total, found)
    return total


def free_memory() -> int:
    """Return the bytes that processes may still take, as the machine tells; never more than `total_memory`."""
    return min(_meminfo("MemAvailable"), total_memory())


def in_gib(size: int) -> str:
    """Write a size in bytes for people, in GiB."""
    return f"{size / 2**30:,.1f} GiB"


def _meminfo(name: str) -> int:
    """A line of /proc/meminfo in bytes."""
    found = re.search(rf"^{name}: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found, f"/proc/meminfo has no {name}"
    return int(found[1]) << 10


def _number(path: str) -> int | None:
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None
