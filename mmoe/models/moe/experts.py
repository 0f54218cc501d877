"""The experts: one SwiGLU network each, and the engines that multiply groups of rows with their weights.

Shape suffixes: R rows sorted by expert, E experts, D model width, F hidden width; `ends_E` (i32) are the rows
before which each expert's group ends.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.models.dtypes import compute_dtype

Engine = Literal["grouped_mm", "loop"]
GROUPED_MM_MULTIPLE = 8  # widths are multiples of 16 bytes in bfloat16


def grouped_mm(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """One call for all groups. Raises ConfigError in float64, which the kernel does not have."""
    if x_RD.dtype is torch.float64:
        raise ConfigError("model.moe.engine is grouped_mm, which has no float64 kernel; set it to loop")
    return F.grouped_mm(x_RD, weight_EDF, offs=ends_E)


def loop(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The reference: one product a group, in any dtype."""
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([x_nD @ weight_DF for x_nD, weight_DF in zip(x_RD.split(sizes), weight_EDF)])


ENGINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"grouped_mm": grouped_mm, "loop": loop}


class Experts(nn.Module):
    """E SwiGLU networks: down(silu(gate(x)) * up(x)), each over its own group of rows."""

    def __init__(self, experts: int, size: int, hidden: int, engine: Engine):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, size, hidden))
        self.up = nn.Parameter(torch.empty(experts, size, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, size))
        self.product = ENGINES[engine]

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """[R, D] sorted by expert -> [R, D], in the dtype of the products."""
        dtype = compute_dtype(x_RD)
        x = x_RD.to(dtype)
        gate, up, down = (weight.to(dtype) for weight in (self.gate, self.up, self.down))
        hidden = F.silu(self.product(x, gate, ends_E)) * self.product(x, up, ends_E)
        return self.product(hidden, down, ends_E)
