"""A save stands beside the collectives of the training loop: they share no group, in whatever order they come."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmoe.checkpoint.commit import PARTIAL, commit, path_of
from mmoe.checkpoint.group import checkpoint_ranks
from mmoe.checkpoint.snapshot import Snapshot
from mmoe.checkpoint.writer import write
from mmoe.compat import process_groups
from mmoe.runtime.agreement import ProcessGroupRanks
from tests.checkpoint.states import loaded, manager, state_of
from tests.distributed.pool import Pool


def collectives() -> int:
    """How many the default group has had."""
    return dist.group.WORLD._get_sequence_number_for_group()


def saved_and_loaded(folder: Path) -> tuple[int, int]:
    """The collectives of the default group while checkpoints are saved and loaded, and the groups of it all."""
    checkpoint_ranks()
    groups = len(process_groups())
    before = collectives()
    for step in (10, 20, 30):
        path = manager(folder, keep=2).save(step, state_of(step))
        assert path == folder / f"checkpoints/step-000000{step}"  # on every rank
    manager(folder).go_back(20)
    assert manager(folder).latest_step() == 20 and loaded(manager(folder)) == 20
    count = collectives() - before
    dist.barrier()
    assert collectives() == before + count + 1  # which are counted so
    return count, len(process_groups()) - groups


def test_saving_and_loading_send_nothing_in_the_default_group_and_all_managers_share_one(
    two: Pool, tmp_path: Path
) -> None:
    assert two.run(saved_and_loaded, tmp_path) == [(0, 0), (0, 0)]


def overtaken(folder: Path) -> tuple[float, float]:
    """Rank 0 starts a sum of the training before it saves, rank 1 only when it has saved."""
    rank, total = dist.get_rank(), torch.tensor(float(dist.get_rank() + 1))
    work = dist.all_reduce(total, async_op=True) if rank == 0 else None
    manager(folder).save(10, state_of(1.0))
    value = loaded(manager(folder))
    (work or dist.all_reduce(total, async_op=True)).wait()
    return total.item(), value


def test_a_collective_of_the_training_may_be_in_flight_while_all_ranks_save(two: Pool, tmp_path: Path) -> None:
    assert two.run(overtaken, tmp_path) == [(3.0, 1.0), (3.0, 1.0)]


def beside(folder: Path) -> tuple[list[float], float]:
    """Sums of the training loop while another thread writes copies of the state of step 10, which goes on."""
    ranks, state = checkpoint_ranks(), state_of(1.0)  # the group is made here, not on the writing thread
    live = Snapshot.take(10, state, {})
    tensors = {name: tensor.clone() for name, tensor in live.tensors.items()}
    snapshot = replace(live, tensors=tensors, owner=None)
    partial = path_of(folder / "checkpoints", 10, PARTIAL)
    raised: list[BaseException] = []

    def save() -> None:
        try:
            ranks.first(lambda: partial.parent.mkdir())
            write(partial, snapshot, snapshot.gather(ranks).documents, ranks)
            ranks.first(lambda: commit(partial))
        except BaseException as error:
            raised.append(error)

    writing = threading.Thread(target=save)
    if dist.get_rank() == 0:
        writing.start()
    sums = []
    for number in range(20):
        total = torch.tensor(float(number))
        dist.all_reduce(total)
        sums.append(total.item())
        state["model"]["weight"].add_(1.0)
        if number == 10 and dist.get_rank() == 1:  # rank 1 comes late to the save, and no sum waits for it
            writing.start()
    writing.join()
    if raised:
        raise raised[0]
    return sums, loaded(manager(folder))


def test_another_thread_writes_copies_while_the_training_goes_on(two: Pool, tmp_path: Path) -> None:
    expected = ([2.0 * number for number in range(20)], 1.0)
    assert two.run(beside, tmp_path) == [expected, expected]


def of_a_half() -> dict[str, Any]:
    """What `ProcessGroupRanks` of two of four processes do, of which the first is not the first of all."""
    low, high = dist.new_group([0, 1]), dist.new_group([2, 3])
    ranks = ProcessGroupRanks(low if dist.get_rank() < 2 else high)

    def fails_on_the_second() -> int:
        if ranks.rank == 1:
            raise OSError(f"of {dist.get_rank()}")
        return dist.get_rank()

    found: dict[str, Any] = {"rank": (ranks.rank, ranks.size)}
    found["first"] = ranks.first(dist.get_rank)
    found["gather"] = ranks.gather(dist.get_rank())
    try:
        ranks.every(fails_on_the_second)
    except OSError as error:
        found["every"] = str(error)
    return found


def test_ranks_of_a_group_agree_among_themselves(four: Pool) -> None:
    for rank, found in enumerate(four.run(of_a_half)):
        first, second = (rank // 2 * 2, rank // 2 * 2 + 1)
        assert found["rank"] == (rank % 2, 2) and found["first"] == first
        assert found["gather"] == ([first, second] if rank == first else [])
        assert found["every"] == f"of {second}"
