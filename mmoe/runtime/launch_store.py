"""Makes the store through which the processes of one attempt find each other, and none of an earlier attempt.

torchrun keeps one store over its restarts (pytorch issues 135712 and 167288): a restarted process may read the address
that a dead one left under the same key, and fail to connect. TORCHELASTIC_RESTART_COUNT cannot tell the attempts apart,
since every machine's torchrun counts for itself. So rank 0 names the attempt, and each rank takes only a name that
answers its own question of this attempt; all keys then lie under that name.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from mmoe.errors import MmoeError
from mmoe.runtime.launch_errors import name_ranks

PERIOD_SECONDS = 0.1  # between two questions to the store, which serves all ranks


class JoinError(MmoeError):
    """Processes that did not all come to the start of a run."""


def join_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the store of this attempt, this process's rank, and how many there are; from torchrun's environment.

    Returns once all ranks know the attempt's name. Raises `JoinError` where they have not come within `timeout`.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    end = time.monotonic() + timeout.total_seconds()
    name = _name_attempt(store, world, end) if rank == 0 else _learn_name(store, rank, end)
    return dist.PrefixStore(f"mmoe/{name}", store), rank, world


def _name_attempt(store: dist.Store, world: int, end: float) -> str:
    """Rank 0: answer every rank's question, anew where a dead process had asked first, until all have the name."""
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    absent = set(range(1, world))
    while True:
        for rank in sorted(absent):
            key = f"mmoe/join/{rank}"
            if store.check([key]) and (question := store.get(key)) != answered.get(rank):
                store.set(f"{key}/answer", f"{question.decode()} {name}")
                answered[rank] = question
            if store.check([f"{key}/joined"]) and store.get(f"{key}/joined").decode() == name:
                absent.discard(rank)
        if not absent:
            return name
        if time.monotonic() > end:
            raise JoinError(
                f"{name_ranks(sorted(absent))} of {world} did not come in parallel.timeout_seconds; "
                "see what torchrun printed on their machines"
            )
        time.sleep(PERIOD_SECONDS)


def _learn_name(store: dist.Store, rank: int, end: float) -> str:
    key, question = f"mmoe/join/{rank}", uuid.uuid4().hex
    store.set(key, question)
    while time.monotonic() < end:
        if store.check([f"{key}/answer"]):
            asked, name = store.get(f"{key}/answer").decode().split()
            if asked == question:
                store.set(f"{key}/joined", name)
                return name
        time.sleep(PERIOD_SECONDS)
    raise JoinError(
        f"rank 0 did not answer rank {rank} in parallel.timeout_seconds; see what torchrun printed on its machine"
    )
