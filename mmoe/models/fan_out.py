"""Hands one tensor to several readers, whose gradients are added in an order that no layout changes."""

from typing import Any

import torch
from torch import Tensor

from mmoe.precision.upcast import upcast


def fan_out(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """Return `x` once for each of its `readers`; the gradient is the sum of theirs in this order, rounded once.

    Left to autograd, gradients are added as they arrive, each sum rounded to the dtype of `x`. Of three or more the
    order then shows, by up to 2^-9 in bfloat16, and it follows from how the graph was built: FSDP's hooks, stages of a
    pipeline and recomputation change it.
    """
    return _FanOut.apply(x, readers)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, readers: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first, second, *others = grads
        total = upcast(first) + second  # in the wider dtype of the two
        for grad in others:
            total += grad
        return total.to(first.dtype), None
