"""Collectives with gradients, in the sense that every rank's loss is a part of the sum over ranks.

A tensor that ranks gather is read by all of them, so its gradient is the sum over them; a tensor that they add up is a
part of one sum, so its gradient is what every part gets.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.compat import all_gather_single, reduce_scatter_single


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: the equal-shaped `x` of every rank; its gradient is summed over the ranks and split again."""
    return _Gather.apply(x, group)


def split_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] of every rank -> [...]: the sum over the ranks of what each has for this one. Undoes `gather`."""
    return _SplitSum.apply(x, group)


def join(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As `gather`, of what every rank then uses in the same way: the gradient is that of the own part, once."""
    return _Join.apply(x, group)


class Exchange:
    """Rows to the ranks in turn, ``sent[r]`` to rank r, and ``received[r]`` rows from it; None: equal shares.

    ``start`` sends and ``finish`` waits, so that something can be computed in between; gradients go the other way.
    """

    def __init__(self, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> None:
        self.received, self.sent, self.group = received, sent, group
        self._work: dist.Work | None = None

    def start(self, x: Tensor) -> Tensor:
        """[rows sent, ...] -> [rows received, ...], not to be read before `finish`."""
        return _Exchange.apply(x, self)

    def finish(self) -> None:
        """Wait until the rows that `start` sent have arrived; without a `start`, do nothing."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def back(self, y: Tensor) -> Tensor:
        """[rows received, ...] -> [rows sent, ...]: the answers to what was sent."""
        reverse = Exchange(self.sent, self.received, self.group)
        out = reverse.start(y)
        reverse.finish()
        return out

    def _run(self, x: Tensor, received: list[int] | None, sent: list[int] | None) -> tuple[Tensor, dist.Work]:
        out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group, async_op=True)
        assert work is not None  # this rank is in the group
        return out, work


def gather_constant(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As `gather`, without a gradient."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    all_gather_single(out.flatten(0, 1), x.detach().contiguous(), group)
    return out


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, a new tensor without a gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_constant(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[1:])
        reduce_scatter_single(own, grad.contiguous().flatten(0, 1), group=ctx.group)
        return own, None


class _SplitSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        own = x.new_empty(x.shape[1:])
        reduce_scatter_single(own, x.contiguous().flatten(0, 1), group=group)
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_constant(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return gather_constant(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        out, exchange._work = exchange._run(x, exchange.received, exchange.sent)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, work = ctx.exchange._run(grad, ctx.exchange.sent, ctx.exchange.received)
        work.wait()
        return out, None
