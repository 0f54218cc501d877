"""Decoding processes that can be watched: what each is doing, who is late, and who died."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmoe.errors import MmoeError

_WIDTH = 512  # bytes of what a worker says
_ENDED = "exited unexpectedly", "is killed by signal"  # how torch's loader speaks of a dead worker


class WorkerError(MmoeError):
    """A decoding process that ended by itself: killed, out of memory, or crashed in a decoder."""


class Activity:
    """What each worker is doing, in memory shared with the training process: a time, a pid, a line of text."""

    def __init__(self, workers: int):
        self._numbers = torch.zeros(max(workers, 1), 2, dtype=torch.float64).share_memory_()
        self._texts = torch.zeros(max(workers, 1), _WIDTH, dtype=torch.uint8).share_memory_()

    def say(self, text: str) -> None:
        """Called where the work is done, in a worker or in the training process."""
        info = get_worker_info()
        worker = info.id if info else 0
        line = text.encode()[:_WIDTH].ljust(_WIDTH, b"\0")
        self._texts[worker] = torch.frombuffer(bytearray(line), dtype=torch.uint8)
        self._numbers[worker, 0], self._numbers[worker, 1] = time.time(), os.getpid()

    def lines(self) -> list[str]:
        """One sentence a worker."""
        now, sentences = time.time(), []
        for worker, ((since, pid), text) in enumerate(zip(self._numbers.tolist(), self._texts)):
            said = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
            doing = f"pid {int(pid)}, for {now - since:.0f} s: {said}" if since else "has not begun"
            sentences.append(f"worker {worker} ({doing})")
        return sentences


class Watchdog:
    """Prints what every worker is doing whenever nothing came for `seconds`; it never ends the run itself."""

    def __init__(self, seconds: float, activity: Activity):
        self.seconds, self.activity = seconds, activity
        self._since: float | None = None  # when the wait in progress began
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever may take too long."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        told = 0.0  # the length of the present wait when it was last spoken of
        while not self._closed.wait(self.seconds / 4):
            since = self._since
            late = 0.0 if since is None else time.monotonic() - since
            told = 0.0 if late < told else told
            if late - told >= self.seconds:
                print(f"no batch for {late:.0f} s; " + "; ".join(self.activity.lines()), file=sys.stderr, flush=True)
                told = late


def batches(
    dataset: Dataset, plans: Iterable[Any], *, workers: int, prefetch: int, activity: Activity, watchdog_seconds: float
) -> Iterator[Any]:
    """``dataset[plan]`` of every plan, in order, decoded ahead by `workers` processes (0: in this one).

    Raises WorkerError, naming what it was doing, when a worker dies.
    """
    loader = DataLoader(
        dataset,
        sampler=plans,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_one_thread,
    )
    watchdog = Watchdog(watchdog_seconds, activity)
    try:
        arriving = iter(loader)
        while True:
            try:
                with watchdog.waiting():
                    batch = next(arriving)
            except StopIteration:
                return
            except RuntimeError as error:
                if not any(ended in str(error) for ended in _ENDED):
                    raise
                doing = "; ".join(activity.lines())
                raise WorkerError(
                    f"a decoding process ended by itself ({str(error).splitlines()[0]}); it was killed (often for "
                    f"memory: lower data.workers or data.prefetch) or crashed in a decoder. {doing}"
                ) from error
            yield batch
    finally:
        watchdog.close()


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
