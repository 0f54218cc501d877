"""Copying rows by index, and adding them with weights, forwards and backwards."""

import torch
import torch.nn.functional as F
from torch import Tensor


def copy_rows(x: Tensor, index: Tensor, inverse: Tensor, share: int = 1, complete: bool = False) -> Tensor:
    """out[i] = x[index[i] // share], zero where that is past the end of x.

    `inverse` [len(x) * share] says which row of `out` each share of each row of x went to, past its end for none.
    With it the gradient is a copy too (and a sum over the shares of a row, in their order), not a scattered sum
    that depends on which thread comes first. `complete` promises that neither points past an end, and saves the
    zeros that would be put there.
    """
    return _CopyRows.apply(x, index, inverse, share, complete)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, share: int, complete: bool) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape, ctx.complete = (len(x), share), complete
        return _select(x, index // share if share > 1 else index, complete)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse,) = ctx.saved_tensors
        shares = _select(grad, inverse, ctx.complete)
        return shares.unflatten(0, ctx.shape).sum(1) if ctx.shape[1] > 1 else shares, None, None, None, None


def weighted_rows(y: Tensor, weight: Tensor, row: Tensor, choice: Tensor, complete: bool) -> Tensor:
    """out[t] = sum_k weight[t, k] y[row[t, k]], summed in the wider dtype and rounded once to that of y; rows past
    the end of y add zero.

    `choice` [len(y)] is the flattened (t, k) that each row of y belongs to, past the end of `weight` for none. One
    share at a time, so that no [T, K, D] exists; the gradient of y is a scaled copy, written once in y's dtype.
    """
    return _WeightedRows.apply(y, weight, row, choice, complete)


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, row: Tensor, choice: Tensor, complete: bool) -> Tensor:
        ctx.save_for_backward(y, weight, row, choice)
        ctx.complete = complete
        first, *others = (_select(y, row_T, complete) * weight_T[:, None] for row_T, weight_T in zip(row.T, weight.T))
        for other in others:
            first += other
        return first.to(y.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y, weight, row, choice = ctx.saved_tensors
        shares = [(_select(y, row_T, ctx.complete) * grad).sum(1, dtype=weight.dtype) for row_T in row.T]
        token = choice // row.shape[1]  # T for an empty row, which is past the end of grad
        scale = _select(weight.reshape(-1, 1), choice, ctx.complete).to(y.dtype)  # mixed dtypes take 20 times as long
        grad_y = torch.empty_like(y)
        torch.mul(_select(grad, token, ctx.complete), scale, out=grad_y)
        return grad_y, torch.stack(shares, 1), None, None, None


def _select(x: Tensor, index: Tensor, complete: bool) -> Tensor:
    return (x if complete else F.pad(x, (0, 0, 0, 1))).index_select(0, index)
