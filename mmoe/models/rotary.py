"""Computes rotary positions on three axes: time, row, column.

Frequency f of a head (``theta ** (-2 f / head_dim)``, as in RoPE, Su et al. 2021) turns by the position on axis
``f % 3``, so that every axis has fast and slow frequencies. Where the three axes are equal, as in text, this is
ordinary RoPE. Frequency f turns the pair of dimensions (f, f + head_dim / 2). Shapes: B sequences, L positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROTARY_AXES = 3


@dataclass(frozen=True)
class RotaryTables:
    """Holds `cos` and `sin` of every position's angles, [B, L, 1, head_dim], in float32 or wider.

    Half precision is too coarse beyond position 256.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_positions(cls, position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> "RotaryTables":
        """Compute the tables of `position` [B, L, 3] (integers), once a batch, in `dtype` or float32, the wider one."""
        dtype = torch.promote_types(dtype, torch.float32)
        even = torch.arange(0, head_dim, 2, device=position.device)
        frequency = 1.0 / theta ** (even.to(dtype) / head_dim)
        axis = (even // 2) % ROTARY_AXES
        angle = position.to(dtype)[..., axis] * frequency
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(-2)
        return cls(angle.cos(), angle.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """Turn x [B, L, heads, head_dim] by its position; the result is in the dtype of the tables."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin
