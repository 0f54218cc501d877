"""Ends, from a thread beside the training loop, a run whose processes no longer go on together.

Every rank has one. It publishes a heartbeat (step, phase) in the process group's store, and stops its process when

- no progress has been reported for `timeout` seconds and the main thread has waited that long in a collective: the
  first rank that notices asks all others what they do, and writes RUN/hang-report.txt;
- another rank has failed, and this one has not ended by itself a little later (its peer may be on a machine whose
  torchrun cannot stop processes here);
- torchrun itself is gone.

The end is `os._exit`: the main thread is inside a call that will not return.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from mmoe.compat import default_store, process_groups, set_group_timeout
from mmoe.files import write_atomically
from mmoe.runtime.launch import MARGIN_SECONDS
from mmoe.runtime.launch_errors import FAILED, StoppedError, first_failure, name_ranks, record_error
from mmoe.runtime.processes import end_process
from mmoe.runtime.watch_report import hang_report, verdict
from mmoe.runtime.watch_state import MainThread, State, blocking_call, pending_collectives, place, stack

SILENT_PERIODS = 4  # without a heartbeat, until a rank counts as killed
STORE_SECONDS = 10.0  # for one question to the store; and the longest that a rank is waited for

_entries = itertools.count()  # of watches, equal on all ranks: what one has left in the store is none of the next one's


class StepWatchdog:
    """Ends a run that hangs: ``with StepWatchdog(timeout, folder) as watch: ... watch.beat(step, "forward")``.

    Enter and leave it on all ranks together, once all groups exist (their timeouts are set to fit). An exception that
    leaves it is told to the other ranks, and marked with the step (`at_step`) and the failure of another rank that
    came first (`after`), for RUN/errors.jsonl. Without a process group it starts no thread.
    """

    def __init__(self, timeout: float, run_folder: Path) -> None:
        self.timeout, self.folder = timeout, run_folder
        self.step: int | None = None
        self.phase = "start"
        self._beaten = time.monotonic()
        self._watcher: _Watcher | None = None

    def beat(self, step: int, phase: str) -> None:
        """Say that the loop goes on: `step` is the number of the step under way, `phase` what it does now."""
        self.step, self.phase, self._beaten = step, phase, time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._beaten

    def __enter__(self) -> StepWatchdog:
        self._beaten = time.monotonic()
        if dist.is_initialized():
            self._watcher = _Watcher(self)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        earlier = None if self._watcher is None else self._watcher.stop(error if isinstance(error, Exception) else None)
        if isinstance(error, Exception):
            vars(error).update(at_step=self.step, after=earlier)


class _Watcher(threading.Thread):
    """The thread. All it shares with other ranks are keys of the store."""

    def __init__(self, watch: StepWatchdog) -> None:
        super().__init__(name="watch", daemon=True)
        self.watch, self.folder = watch, watch.folder
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.period = min(1.0, watch.timeout / 10)
        self.patience = min(STORE_SECONDS, watch.timeout)
        self.parent = os.getppid()
        self.main = MainThread()
        self.stopped = threading.Event()
        # the main thread may sit in a question to the store: the watcher needs a connection of its own
        self.store = default_store().clone()
        self.store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self.prefix = f"watch/{next(_entries)}"
        # groups of a mesh come with torch's defaults (30 minutes, NCCL 10)
        for group in process_groups():
            set_group_timeout(timedelta(seconds=watch.timeout + MARGIN_SECONDS), group)

    def stop(self, error: Exception | None) -> str | None:
        """End the thread. An `error` of the main thread is told to the other ranks; gives what failed before it."""
        first = None
        if error is not None:
            killed = ""
            with suppress(dist.DistError):  # the store may be gone with what made the error
                killed = self._killed() if isinstance(error, RuntimeError) else ""
            first = first_failure(self.store, self._key("failed"), self.rank, error, killed)
        self.stopped.set()
        self.join(2 * STORE_SECONDS)
        return first

    def _killed(self) -> str:
        """A broken connection is the end of another rank, which could not speak if it was killed: who went silent.

        A rank with an error goes on to send heartbeats while it asks the same.
        """
        if self._failure():
            return ""
        before = self._heartbeats()
        self._until(lambda: bool(self._failure()), SILENT_PERIODS * self.period)
        now = self._heartbeats()
        silent = [rank for rank in before if rank != self.rank and now[rank] == before[rank]]
        if not silent or self._failure():
            return ""
        verb = "gives" if len(silent) == 1 else "give"
        return f"{name_ranks(silent)} {verb} no sign of life: killed (out of memory?), or the machine is gone"

    def _heartbeats(self) -> dict[int, str]:
        """The last one of each rank that has sent one."""
        return {rank: self._get(f"beat/{rank}") for rank in range(self.world) if self._has(f"beat/{rank}")}

    def run(self) -> None:
        while not self.stopped.is_set():
            frame = self.main.look()
            if os.getppid() != self.parent:
                self._record(StoppedError(f"torchrun (process {self.parent}) is gone, so rank {self.rank} stops"))
                end_process(1)
            hangs = self.watch.idle > self.watch.timeout and self._waits(blocking_call(frame))
            try:
                self._beat()
                if hangs or self._has("hang"):
                    self._hang()
                if failure := self._failure():
                    self._stop_after(failure)
            except dist.DistError as error:  # it lives in torchrun of the first machine, which may be gone
                if hangs:
                    self._hang_alone(error)
            self.stopped.wait(self.period)

    def _beat(self) -> None:
        beat = {"time": time.time(), "host": socket.gethostname(), "step": self.watch.step, "phase": self.watch.phase}
        self.store.set(self._key(f"beat/{self.rank}"), json.dumps(beat))

    def _stop_after(self, failure: str) -> None:
        """Another rank has failed: the main thread has `patience` seconds to end by an error of its own."""
        if not self.stopped.wait(self.patience):
            self._record(StoppedError(f"rank {self.rank} was stopped by its watcher"), after=failure)
            end_process(1)

    def _waits(self, blocked: str) -> bool:
        """Whether the main thread has waited for other ranks for `timeout` seconds."""
        if blocked and self.main.seconds > self.watch.timeout:
            return True
        waits, _ = pending_collectives()
        return bool(waits) and waits[0].seconds > self.watch.timeout

    def _state(self) -> State:
        frame = self.main.look()
        waits, called = pending_collectives()
        return State(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self.watch.step,
            phase=self.watch.phase,
            phase_seconds=self.watch.idle,
            waits=waits,
            called=called,
            blocked=blocking_call(frame),
            blocked_seconds=self.main.seconds,
            place=place(frame),
            stack=stack(frame),
        )

    def _hang(self) -> None:
        """Say what this rank does; the first one here collects what all say and writes the report; all end."""
        state = self._state()
        path, doing = self.folder / "hang-report.txt", _first(verdict({self.rank: state}, {}))
        if self.store.add(self._key("hang"), 1) > 1:
            # recorded before the answer: the rank that reports ends at once, and torchrun then ends all others
            error = StoppedError(doing or f"rank {self.rank} waits for no other, at {state.place}")
            self._record(error, after=f"another rank noticed that the run hangs: {path}")
            self._answer(state)
            self._until(lambda: self._has("reported"), 2 * self.patience)
            end_process(1)
        self._answer(state)
        self._until(lambda: all(self._has(f"state/{rank}") for rank in range(self.world)), self.patience)
        states, silent = self._answers()
        self._write(path, hang_report(states, silent, by=self.rank, timeout=self.watch.timeout))
        sentences = _first(verdict(states, silent))
        error = StoppedError(
            f"the run hangs: {sentences}; {path} has all ranks. If such a wait is to be expected, raise "
            "parallel.timeout_seconds"
        )
        self._record(error)
        print(f"error {error}", file=sys.stderr, flush=True)
        self.store.set(self._key("reported"), "1")
        end_process(1)

    def _hang_alone(self, unreachable: dist.DistError) -> None:
        """Report what this rank knows of itself, when the others cannot be asked."""
        state = self._state()
        path = self.folder / f"hang-report-rank-{self.rank:05d}.txt"
        text = hang_report({self.rank: state}, {}, by=self.rank, timeout=self.watch.timeout)
        self._write(path, f"{text}\nno other rank could be asked: {unreachable}\n")
        self._record(StoppedError(f"the run hangs ({_first(verdict({self.rank: state}, {}))}); see {path}"))
        end_process(1)

    def _answer(self, state: State) -> None:
        self.store.set(self._key(f"state/{self.rank}"), state.to_json())

    def _answers(self) -> tuple[dict[int, State], dict[int, str]]:
        """What each rank said of itself, and of those that said nothing the last heartbeat."""
        states, silent = {}, {}
        for rank in range(self.world):
            if self._has(f"state/{rank}"):
                states[rank] = State.from_json(self._get(f"state/{rank}"))
            elif self._has(f"beat/{rank}"):
                beat = json.loads(self._get(f"beat/{rank}"))
                seconds = time.time() - beat["time"]
                silent[rank] = (
                    f"its last heartbeat is {seconds:.1f} s old (host {beat['host']}, step {beat['step']}, "
                    f"{beat['phase']}): killed, stopped, or in a call that holds Python's lock"
                )
            else:
                silent[rank] = "it has never sent a heartbeat"
        return states, silent

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as full:  # the run must end all the same, and say why
            print(f"{path} cannot be written ({full.strerror}):\n{text}", file=sys.stderr, flush=True)

    def _record(self, error: StoppedError, after: str | None = None) -> None:
        record_error(self.folder, self.rank, error, step=self.watch.step, after=after)

    def _failure(self) -> str:
        """What failed first, within the watch or outside it (of a process that has not come, or has left); else ""."""
        for key in (self._key("failed"), FAILED):
            if self.store.check([key]):
                return self.store.get(key).decode()
        return ""

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _has(self, name: str) -> bool:
        return self.store.check([self._key(name)])

    def _get(self, name: str) -> str:
        return self.store.get(self._key(name)).decode()

    def _until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Wait until it has happened, or for `seconds`."""
        deadline = time.monotonic() + seconds
        while not happened() and time.monotonic() < deadline:
            time.sleep(self.period / 4)


def _first(sentences: list[str], number: int = 3) -> str:
    """As many as fit into one error."""
    more = f"; and {len(sentences) - number} more" if len(sentences) > number else ""
    return "; ".join(sentences[:number]) + more
