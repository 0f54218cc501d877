"""Show what decoding processes are doing: who is late, and what one was at when it died."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mmoe.errors import MmoeError

logger = logging.getLogger(__name__)

SamplePlace = tuple[int, int, int]  # a sample: its source's number, shard and row

_WIDTH = 512  # bytes of what a worker says
_here: int | None = None  # the number of this process among the workers


class WorkerError(MmoeError):
    """Says that a decoding process ended by itself: killed, out of memory, or crashed in a decoder."""


def become_worker(number: int) -> None:
    """Turn this process into decoding process `number`; it is called once in each."""
    global _here
    _here = number


def is_worker() -> bool:
    """Return True if this is a decoding process, and not the training process."""
    return _here is not None


class Activity:
    """Shows what each worker does, in memory shared with the training process: a time, a pid, a sample, a text."""

    def __init__(self, workers: int) -> None:
        count = max(workers, 1)
        self._shared = (
            torch.zeros(count, 2, dtype=torch.float64).share_memory_(),
            torch.full((count, 3), -1, dtype=torch.int64).share_memory_(),
            torch.zeros(count, _WIDTH, dtype=torch.uint8).share_memory_(),
        )
        self.__setstate__(self._shared)

    def __getstate__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._shared  # which stays shared on the way to another process

    def __setstate__(self, shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        # The same memory for numpy, whose assignments cost a fraction of torch's: one is made for every document.
        self._shared = shared
        self._numbers, self._places, self._texts = (tensor.numpy() for tensor in shared)

    def say(self, text: str, place: SamplePlace | None = None) -> None:
        """Write down what this process, a worker or the training process, does now; `place` is its sample."""
        worker = _here or 0
        line = text.encode(errors="backslashreplace")[:_WIDTH].ljust(_WIDTH, b"\0")
        self._texts[worker] = np.frombuffer(line, np.uint8)
        self._places[worker] = place or (-1, -1, -1)
        self._numbers[worker] = time.time(), os.getpid()

    def place(self, worker: int) -> SamplePlace | None:
        """Return the sample that a worker has in hand."""
        source, shard, row = self._places[worker].tolist()
        return None if source < 0 else (source, shard, row)

    def text(self, worker: int) -> str:
        """Return what a worker said last."""
        return self._texts[worker].tobytes().rstrip(b"\0").decode(errors="replace")

    def clear(self, worker: int) -> None:
        """Forget what a worker said, before another process becomes this worker."""
        self._numbers[worker], self._places[worker], self._texts[worker] = 0.0, -1, 0

    def lines(self) -> list[str]:
        """Return one sentence a worker on what it does."""
        now, sentences = time.time(), []
        for worker, (since, pid) in enumerate(self._numbers.tolist()):
            doing = f"pid {int(pid)}, for {now - since:.0f} s: {self.text(worker)}" if since else "has not begun"
            sentences.append(f"worker {worker} ({doing})")
        return sentences


class WorkerWatchdog:
    """Prints what every worker is doing whenever nothing came for `seconds`; it never ends the run itself."""

    def __init__(self, seconds: float, activity: Activity) -> None:
        self.seconds, self.activity = seconds, activity
        self._since: float | None = None  # when the wait in progress began
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Watch while the context lasts; it goes around whatever may take too long."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        told = 0.0  # the length of the present wait when it was last spoken of
        while not self._closed.wait(self.seconds / 4):
            since = self._since
            late = 0.0 if since is None else time.monotonic() - since
            told = 0.0 if late < told else told
            if late - told >= self.seconds:
                logger.warning(f"no batch for {late:.0f} s; " + "; ".join(self.activity.lines()))
                told = late
