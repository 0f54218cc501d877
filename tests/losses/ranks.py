"""Ranks that gather rows from one another, as threads of one process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

from mmoe.losses.info_nce import Gather


class _Exchange(torch.autograd.Function):
    """All-gather of rows forward, reduce-scatter of their gradients backward; `meet` swaps tensors between ranks."""

    @staticmethod
    def forward(ctx, rows, rank, meet):
        brought = meet(rows)
        ctx.first, ctx.count, ctx.meet = sum(map(len, brought[:rank])), len(rows), meet
        return torch.cat(brought)

    @staticmethod
    def backward(ctx, gradient):
        return sum(ctx.meet(gradient))[ctx.first : ctx.first + ctx.count], None, None


def in_ranks(number: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """`work(rank, gather)` of every rank at the same time; its backward passes must be inside it."""
    barrier, brought = Barrier(number, timeout=30), [None] * number

    def run(rank: int) -> Any:
        def meet(tensor):
            brought[rank] = tensor
            barrier.wait()
            found = list(brought)
            barrier.wait()
            return found

        def gather(rows):
            every = _Exchange.apply(rows, rank, meet)
            return every, sum(map(len, meet(rows)[:rank]))

        return work(rank, gather)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))
