"""Begins and ends one process of a run, or one of the many that torchrun started: its group, its voice, its errors.

torchrun gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. With them there is a process
group; without them the run is one process, and nothing here does anything.
"""

import faulthandler
import hashlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mmoe.compat import default_store
from mmoe.config.load import flatten
from mmoe.config.reader import read_yaml
from mmoe.errors import ConfigError, MmoeError
from mmoe.files import writes
from mmoe.runtime.launch_errors import FAILED, StoppedError, first_failure, name_ranks, record_error
from mmoe.runtime.launch_store import PERIOD_SECONDS, join_store
from mmoe.runtime.logging import rank_log, restart_count
from mmoe.runtime.processes import end_torchrun

logger = logging.getLogger(__name__)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A group's own timeout ends the process with a sentence about one socket or one kernel: it waits until the watcher
# (`mmoe.runtime.watch`), which knows what all ranks do, has had its time.
MARGIN_SECONDS = 30
CLOSING_SECONDS = 10  # for the group's end after an error, when other ranks may never answer again

_turns = itertools.count()  # of `rank_zero_first`: equal on all ranks


@contextmanager
def distributed_context(timeout_seconds: float, run_folder: Path) -> Iterator[int]:
    """Join the process group that torchrun's environment describes; gives the number of processes.

    An error that leaves this context is written to RUN/errors.jsonl and given to torchrun, the group is left, and the
    process ends non-zero: rank 0 by the error (or a sentence on the one that came first elsewhere), the others by a
    silent exit.
    """
    if not all(name in os.environ for name in TORCHRUN):
        yield 1
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.enable()  # the stack of a segmentation fault
    try:
        with rank_log(run_folder, rank):
            backend = _join(timeout_seconds)
            if rank == 0:
                _set_aside_hang_report(run_folder)
                logger.info(_introduction(world, backend))
            yield world
    except Exception as error:
        outlast_sigterm()
        step = getattr(error, "at_step", None)
        after = _first_failure(rank, error)
        record_error(run_folder, rank, error, step=step, after=after)
        _leave_after_error()
        if isinstance(error, MmoeError) and error.exit_code == ConfigError.exit_code:
            end_torchrun()
        if rank > 0:
            raise SystemExit(error.exit_code if isinstance(error, MmoeError) else 1) from error
        if after is not None:
            raise StoppedError(f"{after}; {run_folder / 'errors.jsonl'} has the errors of all ranks") from error
        raise
    except BaseException:  # Ctrl-C, or an exit that somebody asked for
        _leave_after_error()
        raise
    dist.destroy_process_group()


def outlast_sigterm() -> None:
    """Ignore SIGTERM from here on: torchrun sends one to all ranks when one fails, and these have errors to write.

    It ends them all the same, 30 seconds later.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def same_config(text: str) -> None:
    """Compare the YAML of all ranks' configs; where they are not all equal, every rank raises the same `ConfigError`.

    Digests travel first (32 bytes a rank), then one text of each kind.
    """
    if not dist.is_initialized():
        return
    own = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, own)
    ranks: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks.setdefault(bytes(digest.tolist()), []).append(rank)
    if len(ranks) == 1:
        return
    texts = []
    for members in ranks.values():
        box = [text]
        dist.broadcast_object_list(box, src=members[0], device=torch.device("cpu"))
        texts.append(box[0])
    kinds = [flatten(read_yaml(kind, "the config of a process")) for kind in texts]
    keys = sorted({key for kind in kinds for key in kind if len({repr(other.get(key)) for other in kinds}) > 1})
    differences = "; ".join(
        f"{key} is "
        + " and ".join(f"{kind.get(key)!r} on {name_ranks(members)}" for kind, members in zip(kinds, ranks.values()))
        for key in keys
    )
    raise ConfigError(
        f"the processes were started with different configs: {differences}; "
        "give torchrun the same config file and the same overrides on every machine"
    )


def strongest(*values: int) -> list[int]:
    """Give the largest of all ranks for each of the `values`, over the CPU's group (no wait for a GPU's queue)."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def rank_zero_first(work: Callable[[], None]) -> None:
    """Rank 0 does `work`, however long it takes; the others wait for its end, without the timeout of a collective.

    Raises `MmoeError` on the others where it fails.
    """
    if not dist.is_initialized():
        work()
        return
    # A connection of its own: a question to the store keeps no other thread waiting.
    store = default_store().clone()
    key = f"alone/{next(_turns)}"
    if dist.get_rank() == 0:
        try:
            work()
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return
    while not store.check([key]):
        time.sleep(PERIOD_SECONDS)
    if store.get(key) == b"failed":
        raise MmoeError("rank 0 failed at what it does for all ranks; see its error")


def _join(timeout_seconds: float) -> str:
    """Initialize the default group; on a GPU, CPU tensors still go by gloo (flags, objects, counts)."""
    timeout = timedelta(seconds=timeout_seconds + MARGIN_SECONDS)
    if not torch.cuda.is_available():
        store, rank, world = join_store(timeout)
        dist.init_process_group("cpu:gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        return "gloo"
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this machine has no GPU of its own (there are {torch.cuda.device_count()}); "
            f"start at most that many a machine: torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    store, rank, world = join_store(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world, timeout=timeout, device_id=device
    )
    return "nccl"


def _first_failure(rank: int, error: Exception) -> str | None:
    """What failed before the error, as its watch or (of an error outside a watch) the store knows."""
    if not dist.is_initialized():
        return None
    known = getattr(error, "after", None)
    first = first_failure(default_store(), FAILED, rank, error, known or "")
    return known if hasattr(error, "after") else first


def _leave_after_error() -> None:
    """Leave the group; peers that hang must not keep this process, so the attempt has an end of its own."""
    if not dist.is_initialized():
        return
    deadline = threading.Timer(CLOSING_SECONDS, os._exit, (1,))
    deadline.daemon = True
    deadline.start()
    with suppress(RuntimeError):  # a broken group may refuse; the error that broke it is the one to be read
        dist.destroy_process_group()
    deadline.cancel()


def _introduction(world: int, backend: str) -> str:
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    restarts = f", restart {restart_count()} of {os.environ['TORCHELASTIC_MAX_RESTARTS']}" if restart_count() else ""
    return f"{world} processes on {machines} machine{'s' if machines != '1' else ''}, {backend}{restarts}"


def _set_aside_hang_report(folder: Path) -> None:
    """A report of an earlier attempt gets its time as part of its name: hang-report.txt is always this attempt's."""
    report = folder / "hang-report.txt"
    if report.is_file():
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(report.stat().st_mtime))
        with writes(folder):
            report.rename(folder / f"hang-report-{written}.txt")
