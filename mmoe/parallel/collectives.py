"""Provides collectives with gradients, where the global loss is the sum of the ranks' losses.

Hence the gradient of an all-gather is a reduce-scatter, and that of a reduce-scatter an all-gather. Torch's plain names
promise other gradients, so each of these says its own. [ranks, ...] holds the equal-shaped tensors of all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.compat import all_gather_single, reduce_scatter_single


def all_gather_scatter_grad(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather `x` of every rank, [ranks, ...]; its gradient is summed over the ranks and scattered."""
    return _AllGather.apply(x, group)


def reduce_scatter_gather_grad(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks what each has for this one, [ranks, ...] -> [...]; its gradient is gathered."""
    return _ReduceScatter.apply(x, group)


def all_gather_replicated(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather `x` of every rank, which all then use in the same way: its gradient is that of the own part, once."""
    return _AllGatherReplicated.apply(x, group)


class AllToAll:
    """Sends rows to the ranks in turn, ``sent[r]`` to rank r, and gets ``received[r]`` from it; None: equal shares.

    `start` sends and `wait` waits, so that something can be computed in between; gradients go the other way.
    """

    def __init__(self, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> None:
        self.received, self.sent, self.group = received, sent, group
        self._work: dist.Work | None = None

    def start(self, x: Tensor) -> Tensor:
        """Send rows to the ranks, [rows sent, ...] -> [rows received, ...], not to be read before `wait`."""
        return _AllToAll.apply(x, self)

    def wait(self) -> None:
        """Wait until the rows that `start` sent have arrived; without a `start`, do nothing."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def reverse(self, y: Tensor) -> Tensor:
        """Send back the answers to what was sent, [rows received, ...] -> [rows sent, ...]."""
        way_back = AllToAll(self.sent, self.received, self.group)
        out = way_back.start(y)
        way_back.wait()
        return out

    def _run(self, x: Tensor, received: list[int] | None, sent: list[int] | None) -> tuple[Tensor, dist.Work]:
        out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group, async_op=True)
        assert work is not None  # this rank is in the group
        return out, work


def all_gather_no_grad(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather `x` of every rank, [ranks, ...], without a gradient."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    all_gather_single(out.flatten(0, 1), x.detach().contiguous(), group)
    return out


def all_reduce_no_grad(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `x` over the ranks into a new tensor, without a gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_no_grad(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[1:])
        reduce_scatter_single(own, grad.contiguous().flatten(0, 1), group=ctx.group)
        return own, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        own = x.new_empty(x.shape[1:])
        reduce_scatter_single(own, x.contiguous().flatten(0, 1), group=group)
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_no_grad(grad, ctx.group), None


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return all_gather_no_grad(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, all_to_all: AllToAll) -> Tensor:
        ctx.all_to_all = all_to_all
        out, all_to_all._work = all_to_all._run(x, all_to_all.received, all_to_all.sent)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, work = ctx.all_to_all._run(grad, ctx.all_to_all.sent, ctx.all_to_all.received)
        work.wait()
        return out, None
