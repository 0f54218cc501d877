"""Copying rows by index, forwards and backwards."""

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


def _select(x: Tensor, index: Tensor, complete: bool) -> Tensor:
    return (x if complete else F.pad(x, (0, 0, 0, 1))).index_select(0, index)
