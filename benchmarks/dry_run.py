"""What a dry run of the main run costs: `mmoe estimate configs/moe_10b.yaml --world-size 256` in three layouts.

    python benchmarks/dry_run.py [parallel.ep=8 parallel.ep=16 parallel.pp=4]

Each is the command as a user gives it, with a load of 1.3 on the busiest rank. Wall time, and the peak of the memory of
all its processes together, a page that several share counted once. Prints a table and a last line RESULT {json}.
"""

import subprocess
import sys
import time

import psutil
from rich.table import Table

from mmoe.commands.console import Console
from mmoe.result import print_result, target

LAYOUTS = ("parallel.ep=8", "parallel.ep=16", "parallel.pp=4")
COMMAND = "-m mmoe estimate configs/moe_10b.yaml --world-size 256 --imbalance 1.3".split()
SECONDS, GIB = 90, 3
PERIOD_SECONDS = 0.1


def memory_of_all(process: psutil.Process) -> int:
    """Bytes that a process and its descendants hold, with a page of several counted once (PSS), or RSS without it."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            memory = one.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


def measure(overrides: str) -> tuple[float, float]:
    """Seconds, and GiB at the peak. Raises CalledProcessError where the command fails."""
    started, peak = time.perf_counter(), 0
    with psutil.Popen([sys.executable, *COMMAND, overrides], stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            peak = max(peak, memory_of_all(running))
            time.sleep(PERIOD_SECONDS)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, running.args)
    return time.perf_counter() - started, peak / 2**30


def main() -> None:
    table, figures, targets = Table("256 ranks", "s", "GiB"), {}, {}
    for overrides in sys.argv[1:] or LAYOUTS:
        seconds, memory = measure(overrides)
        table.add_row(overrides, f"{seconds:.0f}", f"{memory:.2f}")
        figures[overrides] = {"seconds": seconds, "gib": memory}
        targets[f"{overrides} seconds"] = target(seconds, SECONDS, at_most=True)
        targets[f"{overrides} GiB"] = target(memory, GIB, at_most=True)
    Console().print(table)
    print_result("dry_run", figures, targets)


if __name__ == "__main__":
    main()
