"""Peak memory of a process tree."""

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from mmoe.runtime.processes import descendants


def process_tree_pss() -> int:
    """Summed proportional set size in bytes of this process and its descendants (shared pages counted once)."""
    total = 0
    for process in [os.getpid(), *descendants()]:
        with suppress(OSError):  # it ended while we looked; the next sample sees what is left
            found = re.search(rb"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_bytes(), re.MULTILINE)
            total += int(found[1]) << 10 if found else 0
    return total


class PeakMemory:
    """Samples the process tree in a thread; `peak` is the largest sum seen, in bytes."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak = 0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def sample(self) -> int:
        """Measure now, and give the peak so far in bytes."""
        self.peak = max(self.peak, process_tree_pss())
        return self.peak

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()
