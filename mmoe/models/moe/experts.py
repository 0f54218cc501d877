"""Defines the experts: one SwiGLU network each, computed by an engine over groups of rows.

Shape suffixes as in `mmoe.models.moe.engines.engine`.
"""

import torch
from torch import Tensor, nn

from mmoe.models.dtypes import compute_dtype
from mmoe.models.moe.engines.engine import EXPERT_ENGINES, KEY, check_dtype
from mmoe.optional import require


class Experts(nn.Module):
    """Holds E SwiGLU networks, down(silu(gate(x)) * up(x)), each of which computes its own group of rows.

    Raises PackageError where what the engine requires is not available.
    """

    def __init__(self, experts: int, size: int, hidden: int, engine: str) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, size, hidden))
        self.up = nn.Parameter(torch.empty(experts, size, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, size))
        found = EXPERT_ENGINES.find(engine)
        for name in found.requires:
            require(name, KEY)
        self.kind, self.engine = engine, found(experts, size, hidden)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Send rows [R, D], sorted by expert, through their experts, [R, D] in the dtype of the products.

        Raises ConfigError where the engine has no products of that dtype (`check_dtype`).
        """
        dtype = compute_dtype(x_RD)
        check_dtype(self.kind, dtype)
        x_RD, gate, up, down = (x.to(dtype) for x in (x_RD, self.gate, self.up, self.down))
        return self.engine.swiglu(x_RD, gate, up, down, ends_E)
