"""Gloo processes that stay: each runs the functions it is sent in turn, on one process group."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


class Pool:
    """`world` processes; a function is sent to all of them and must be importable. Use as a context manager."""

    def __init__(self, world: int, folder: Path):
        context = mp.get_context("spawn")
        self.world = world
        self._tasks = [context.SimpleQueue() for _ in range(world)]
        self._results = context.Queue()
        store = folder / f"store-{world}"
        self._processes = [
            context.Process(
                target=_serve, args=(rank, world, str(store), self._tasks[rank], self._results), daemon=True
            )
            for rank in range(world)
        ]

    def __enter__(self) -> "Pool":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for queue in self._tasks:
            queue.put(None)
        for process in self._processes:
            process.join(5)
            process.kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on every rank; raises AssertionError with the ranks' tracebacks."""
        for queue in self._tasks:
            queue.put((function, arguments))
        answers = dict(self._results.get(timeout=SECONDS) for _ in range(self.world))
        failures = [f"rank {rank}:\n{answer}" for rank, (failed, answer) in sorted(answers.items()) if failed]
        assert not failures, "\n".join(failures)
        return [answers[rank][1] for rank in range(self.world)]


def _serve(rank: int, world: int, store: str, tasks, results) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group(
        "cpu:gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, (False, function(*arguments))))
        except Exception:
            results.put((rank, (True, traceback.format_exc())))
    dist.destroy_process_group()
