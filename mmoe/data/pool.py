"""An ordered map over processes: the same results in the same order for any number of workers."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 4  # items a task: small enough to balance, large enough to hide the exchange
_CHUNKS_AHEAD = 2  # tasks in flight per worker; bounds what waits in memory

_work: Callable = None  # of this worker process: sent once, not with every task


def ordered_map(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work(item)` of every item, in order; in this process for one worker, else in processes of their own.

    `work`, items and results must be picklable for more than one worker. An exception of `work` is raised here.
    """
    if workers == 1:
        yield from map(work, items)
        return
    # Not forked from here, where libraries (torch, FFmpeg) hold threads and locks that a fork would break, but from
    # a fresh server process that has imported what the work needs, once for all pools.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmoe.data.rows"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_receive, initargs=(work,))
    try:
        remaining, running = iter(items), deque[Future]()
        while True:
            while len(running) < _CHUNKS_AHEAD * workers and (chunk := list(islice(remaining, _CHUNK))):
                running.append(pool.submit(_run, chunk))
            if not running:
                return
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _receive(work: Callable) -> None:
    global _work
    _work = work


def _run(chunk: list) -> list:
    return [_work(item) for item in chunk]
