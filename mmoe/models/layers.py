"""Defines the two parts that blocks, experts and heads share: RMS normalization and the SwiGLU network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.models.dtypes import compute_dtype
from mmoe.precision.upcast import upcast


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019).

    Computed in float32 or wider and returned in the dtype of the products that follow.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of x."""
        return F.rms_norm(upcast(x), self.weight.shape, upcast(self.weight), self.eps).to(compute_dtype(x))


class SwiGLU(nn.Module):
    """Computes down(silu(gate(x)) * up(x)) (Shazeer 2020), [..., size] -> [..., size].

    `gate` and `up` are two matrices: one fused matrix is not faster here, and two can be sharded by columns.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, hidden, bias=False)
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Send x [..., size] through the gated network, [..., size]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
