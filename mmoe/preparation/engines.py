"""Runs the units of work of a preparation: in this process, in processes of this machine, or on a Ray cluster.

A unit writes its own result to disk and returns a number, so nothing large travels, and the order in which units
end does not matter.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmoe.errors import DataError
from mmoe.optional import require

T = TypeVar("T")

Engine = Literal["processes", "ray"]

_work: Callable[[Any], int] | None = None  # of this worker process: sent once, not with every task


def run(
    work: Callable[[T], int], tasks: Sequence[T], workers: int, engine: Engine = "processes"
) -> Generator[int, None, None]:
    """Run `work(task)` for every task and yield what it returns, in the order in which the tasks end.

    An exception of `work` is raised here, and the tasks that have not begun are not begun.

    `work` and the tasks must be picklable for more than one worker and for Ray.
    """
    if engine == "ray":
        yield from _on_ray(work, tasks, workers)
    elif min(workers, len(tasks)) <= 1:
        yield from map(work, tasks)
    else:
        yield from _on_processes(work, tasks, min(workers, len(tasks)))


def _on_processes(work: Callable[[T], int], tasks: Sequence[T], workers: int) -> Iterator[int]:
    # Not forked from here, where libraries (torch, FFmpeg) hold threads and locks that a fork would break, but from
    # a fresh server process that has imported what the work needs, once for all pools.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmoe.preparation.chunks"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_receive, initargs=(work,))
    try:
        futures: list[Future[int]] = [pool.submit(_run, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process of the preparation died, often for lack of memory; what is finished is kept: give the "
            "same command again, with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _receive(work: Callable) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for a task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _run(task: object) -> int:
    assert _work is not None  # `_receive` came first
    return _work(task)


def _on_ray(work: Callable[[T], int], tasks: Sequence[T], workers: int) -> Iterator[int]:
    """One Ray task a unit, at most `workers` at a time.

    An environment with RAY_ADDRESS (`auto` for the cluster this machine belongs to) names the cluster; without it a
    Ray of `workers` processors is started here and ended. Every node must see the input and the output under the
    same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    ray = require("ray", "the engine of the preparation")
    own = not ray.is_initialized()
    if own and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif own:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        shared, remote = ray.put(work), ray.remote(_call)
        waiting = list(reversed(tasks))
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(remote.remote(shared, waiting.pop(), str(Path.cwd())))
            done, running = ray.wait(running)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
    finally:
        if own:
            ray.shutdown()


def _call(work: Callable[[T], int], task: T, folder: str) -> int:
    os.chdir(folder)  # paths may be relative to where the command was given
    return work(task)
