"""Provides the reference engine, one product a group.

Shape suffixes as in `mmoe.models.moe.engines.engine`.
"""

import torch
from torch import Tensor

from mmoe.models.moe.engines.engine import ProductEngine, sizes_of


class LoopEngine(ProductEngine):
    """Multiplies one group after another, in any dtype and of any width."""

    def multiply(self, x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each group of rows with the weight of its expert by one product a group, [R, D] -> [R, F]."""
        return torch.cat([x_nD @ weight_DF for x_nD, weight_DF in zip(x_RD.split(sizes_of(ends_E)), weight_EDF)])
