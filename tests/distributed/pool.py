"""Gloo processes that stay: each runs the functions it is sent in turn, on one process group."""

import faulthandler
import os
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # for one function
GRACE = 5  # for the other ranks, once one has failed


class Pool:
    """`world` processes; a function is sent to all of them and must be importable. Use as a context manager.

    After a failure the processes are started anew: those that waited for the failed one are of no use.
    """

    def __init__(self, world: int, folder: Path):
        self.world, self.folder, self.starts = world, folder, 0

    def __enter__(self) -> "Pool":
        context = mp.get_context("spawn")
        self._tasks = [context.SimpleQueue() for _ in range(self.world)]
        self._results = context.Queue()
        store = self.folder / f"store-{self.world}-{self.starts}"
        self.starts += 1
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self.world, str(store), self._tasks[rank], self._results), daemon=True
            )
            for rank in range(self.world)
        ]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(GRACE)
            process.kill()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on every rank; raises AssertionError with the ranks' tracebacks."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        answers, failures = self._answers()
        if failures:
            for process in self._processes:
                process.kill()
            self.__enter__()
        assert not failures, "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
        return [answers[rank] for rank in range(self.world)]

    def _answers(self) -> tuple[dict[int, Any], dict[int, str]]:
        """What the ranks returned, and how those failed that did."""
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + SECONDS
        while len(answers) + len(failures) < self.world and time.monotonic() < end:
            try:
                rank, failed, answer = self._results.get(timeout=0.5)
            except queue.Empty:
                dead = {
                    rank: f"it has ended with {p.exitcode}: see stderr"
                    for rank, p in enumerate(self._processes)
                    if not p.is_alive()
                }
                failures = dead | failures
            else:
                (failures if failed else answers)[rank] = answer
            if failures:
                end = min(end, time.monotonic() + GRACE)
        silent = set(range(self.world)) - answers.keys() - failures.keys()
        return answers, failures | dict.fromkeys(silent, "it has not answered")


def _one_device() -> None:
    """Let all gloo groups of this process share one device.

    Each has one of its own otherwise, with a thread that wakes a hundred times a second: a pool that has had all meshes
    spends more time on them than on its tests.
    """
    device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")

    def create(given: Any, _: object) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, given.timeout
        options.global_ranks_in_group, options.group_name = given.global_ranks_in_group, given.group_id
        return dist.ProcessGroupGloo(given.store, given.group_rank, given.group_size, options)

    dist.Backend.register_backend("gloo", create, extended_api=True, devices="cpu")


def _serve(rank: int, world: int, store: str, tasks, results) -> None:
    faulthandler.enable()  # a process that ends in C++ leaves no other trace
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    _one_device()
    dist.init_process_group(
        "cpu:gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    while True:
        try:
            task = tasks.get()  # imports the function's module
            if task is None:
                break
            function, arguments = task
            results.put((rank, False, function(*arguments)))
        except Exception:
            results.put((rank, True, traceback.format_exc()))
    dist.destroy_process_group()
