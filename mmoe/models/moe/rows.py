"""Copies rows by index, and adds them with weights, forward and backward; counts by index.

Shape suffixes as in `mmoe.models.moe.router`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def permute_tokens(x: Tensor, index: Tensor, inverse: Tensor, share: int = 1, complete: bool = False) -> Tensor:
    """Copy rows by index: out[i] = x[index[i] // share], zero where that is past the end of x.

    `inverse` [len(x) * share] says which row of `out` each share of each row of x went to, past its end for none.
    With it the gradient is a copy too (and a sum over the shares of a row, in their order), not a scattered sum
    that depends on which thread comes first. `complete` promises that neither points past an end, and saves the
    zeros that would be put there.
    """
    return _PermuteTokens.apply(x, index, inverse, share, complete)


class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, share: int, complete: bool) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape, ctx.complete = (len(x), share), complete
        return _select(x, index // share if share > 1 else index, complete)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse,) = ctx.saved_tensors
        if ctx.shape[1] > 1:
            return _add_rows(grad, inverse.unflatten(0, ctx.shape), None, ctx.complete), None, None, None, None
        return _select(grad, inverse, ctx.complete), None, None, None, None


def unpermute_tokens(y: Tensor, weight: Tensor, row: Tensor, slot: Tensor, complete: bool) -> Tensor:
    """Add up rows with weights: out[t] = sum_k weight[t, k] y[row[t, k]]; rows past the end of y add zero.

    The weights are taken in y's dtype, the sum is in float32 or wider and rounded once. `slot` [len(y)] is the
    flattened (t, k) that each row of y belongs to, past the end of `weight` for none. No [T, K, D] exists on the way;
    the gradient of y is a scaled copy, and that of a weight the product of two rows.
    """
    return _UnpermuteTokens.apply(y, weight, row, slot, complete)


class _UnpermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, row: Tensor, slot: Tensor, complete: bool) -> Tensor:
        ctx.save_for_backward(y, weight, row, slot)
        ctx.complete = complete
        return _add_rows(y, row, weight, complete)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y, weight, row, slot = ctx.saved_tensors
        # The token of an empty row is T, past the end of grad; its weight is past the end of the weights.
        grad_R = _select(grad, slot // row.shape[1], ctx.complete)
        dot_R = torch.linalg.vecdot(grad_R, y).to(weight.dtype)
        grad_weight = _select(dot_R[:, None], row.flatten(), ctx.complete).view_as(weight)
        # Mixed dtypes take 20 times as long.
        scale = _select(weight.reshape(-1, 1), slot, ctx.complete).to(y.dtype)
        return grad_R.mul_(scale), grad_weight, None, None, None


def count(number: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """Count how often each number below `size` occurs, where `counted`, i64 [size].

    Unlike bincount, without a wait for the device.
    """
    ones = torch.ones_like(number) if counted is None else counted.long()
    return number.new_zeros(size).scatter_add_(0, number.flatten(), ones.flatten())


def _add_rows(x: Tensor, index_TK: Tensor, weight_TK: Tensor | None, complete: bool) -> Tensor:
    """Sum the rows index[t, k] of x over k, weighted or not, [T, D]; an index past the end of x adds nothing."""
    if len(x) == 0:
        return x.new_zeros(len(index_TK), x.shape[1])
    weight = None if weight_TK is None else weight_TK.to(x.dtype)
    if not complete:
        exists = index_TK < len(x)
        index_TK = index_TK.clamp(max=len(x) - 1)
        weight = exists.to(x.dtype) if weight is None else weight * exists
    return F.embedding_bag(index_TK, x, mode="sum", per_sample_weights=weight)


def _select(x: Tensor, index: Tensor, complete: bool) -> Tensor:
    return (x if complete else F.pad(x, (0, 0, 0, 1))).index_select(0, index)
