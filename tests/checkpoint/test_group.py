"""The group of checkpoints is one for each default group, with its timeout, and ends with it."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mmoe.checkpoint.group import checkpoint_ranks
from mmoe.compat import group_timeout, process_groups, set_group_timeout
from tests.checkpoint.states import loaded, manager, state_of


@contextmanager
def alone(seconds: int) -> Iterator[None]:
    """A default group of this process."""
    dist.init_process_group(
        "cpu:gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=seconds)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_process_that_leaves_its_group_and_joins_another_saves_in_both(tmp_path: Path) -> None:
    seen: list[weakref.ref] = []
    for number in range(3):
        with alone(seconds=20 + number):
            manager(tmp_path).save(number, state_of(number))
            assert loaded(manager(tmp_path)) == number
            group = checkpoint_ranks().group
            assert group is not dist.group.WORLD and len(process_groups()) == 2
            assert group_timeout(group) == timedelta(seconds=20 + number)
            seen.append(weakref.ref(group))
            del group
        gc.collect()
        assert seen[-1]() is None
        assert checkpoint_ranks().group is None and loaded(manager(tmp_path)) == number


def test_its_timeout_is_that_which_the_default_group_was_given_last() -> None:
    with alone(seconds=20):
        set_group_timeout(timedelta(seconds=7), dist.group.WORLD)
        assert group_timeout(checkpoint_ranks().group) == timedelta(seconds=7)


def test_a_manager_that_lists_and_reads_texts_asks_no_other_process(tmp_path: Path) -> None:
    """One process of many may do so, as where the config of a run is damaged."""
    manager(tmp_path).save(10, state_of(1.0), {"config.yaml": "a: 1"})
    with alone(seconds=20):
        assert manager(tmp_path).steps() == [10] and manager(tmp_path).text("config.yaml")[1] == "a: 1"
        assert len(process_groups()) == 1
