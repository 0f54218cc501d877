"""Runs a target over many damaged inputs in a process of its own, and tells every input that it could not bear.

What may come out of an input is a result, or an error meant for the user (`MmoeError`). Anything else is a fault: any
other exception, a signal, more than `SECONDS` for one input, or a process that grew by more than `BYTES`.

A target is a module of this folder with `build(folder) -> Callable[[random.Random], bytes]`, which makes the inputs,
and `run(data, folder)`, which reads one. Inputs follow from (target, number) alone, so a fault that is found is told by
its number; those found before stand in ``seeds.json`` and are always tried again.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = Path(__file__).with_name("seeds.json")  # by target: numbers of inputs that once broke it
SECONDS, BYTES = 5.0, 2 << 30
_STUCK = 30.0  # after which the child gives itself up; code in C hears no Python signal


def campaign(target: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """The faults of inputs `first` to `first + count` and of the seeds: their numbers and what happened."""
    known = json.loads(SEEDS.read_text(encoding="utf-8")).get(target, [])
    todo = sorted({*known, *range(first, first + count)})
    faults: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        while todo:
            (folder / "todo.json").write_text(json.dumps(todo))
            (folder / "number").write_text("")
            command = [sys.executable, "-m", "tests.fuzz.harness", target, str(folder)]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
            faults += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            said = (folder / "number").read_text()
            if done.returncode == 0 or not said:
                if done.returncode:
                    raise RuntimeError(f"{target} could not begin:\n{done.stderr[-3000:]}")
                break
            number = int(said)
            if not any(fault["number"] == number for fault in faults):
                faults.append({"number": number, "fault": f"exit {done.returncode}: {done.stderr[-1500:]}"})
            todo = [other for other in todo if other > number]
    return faults


def _child(target: str, folder: Path) -> None:
    module = importlib.import_module(f"tests.fuzz.{target}")
    from mmoe.commands.console import printable
    from mmoe.errors import MmoeError

    (folder / "data").mkdir(exist_ok=True)
    make = module.build(folder / "data")
    signal.signal(signal.SIGALRM, _late)
    before = _peak()
    for number in json.loads((folder / "todo.json").read_text()):
        (folder / "number").write_text(str(number))
        data = make(random.Random(f"{target} {number}"))
        faulthandler.dump_traceback_later(_STUCK, exit=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            module.run(data, folder / "data")
        except MmoeError as error:
            printable(str(error)).encode()  # as it is told: whatever stands in a file must not end the telling
        except BaseException:
            _tell(number, traceback.format_exc(limit=-6))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        if _peak() - before > BYTES:
            _tell(number, f"the process grew by {(_peak() - before) / 2**30:.1f} GiB")
            sys.exit(3)  # its peak stays: the next inputs need a fresh process


def _late(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tell(number: int, fault: str) -> None:
    print(json.dumps({"number": number, "fault": fault}), flush=True)


def main() -> None:
    """``python -m tests.fuzz.harness TARGET --count 2500``: a campaign by hand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        _child(arguments.target, arguments.folder)
        return
    faults = campaign(arguments.target, arguments.count, arguments.first)
    for fault in faults:
        print(f"{arguments.target} {fault['number']}: {fault['fault']}")
    print(f"{arguments.target}: {len(faults)} faults in {arguments.count} inputs")
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
