"""Lets several processes do something together: all of it succeeds, or every process raises the failure of one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mmoe.errors import CheckpointError, ConfigError

T = TypeVar("T")


class ProcessGroupRanks:
    """Speaks for the ranks of `group` (None: the default one), or for one process without torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.grouped = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if self.grouped else (0, 1)

    def every(self, act: Callable[[], T]) -> T:
        """Return what `act` returns here, once it has returned on every rank."""
        result, failure = _attempt(act)
        if self.grouped:
            failures: list[BaseException | None] = [None] * self.size
            dist.all_gather_object(failures, failure and self.shared(failure), group=self.group)
            failure = failure or next(filter(None, failures), None)
        if failure is not None:
            raise failure
        return result

    def first(self, act: Callable[[], T]) -> T:
        """Return what `act` returns on rank 0, which alone calls it."""
        result: Any = None
        failure: BaseException | None = None
        if self.rank == 0:
            result, failure = _attempt(act)
        if self.grouped:
            told: list[Any] = [result, failure and self.shared(failure)]
            dist.broadcast_object_list(told, group=self.group, group_src=0)
            result, failure = (result, failure) if self.rank == 0 else told
        if failure is not None:
            raise failure
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, an empty list elsewhere."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self.group, group_dst=0)
        return values

    def shared(self, failure: BaseException, rank: int | None = None) -> Exception:
        """Return `failure`, of `rank` (None: this one), as the other ranks raise it."""
        if isinstance(failure, OSError | CheckpointError | ConfigError):
            return failure
        return CheckpointError(f"rank {self.rank if rank is None else rank} failed ({failure!r}); see its own error")


def _attempt(act: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return act(), None
    except BaseException as failure:
        return None, failure
