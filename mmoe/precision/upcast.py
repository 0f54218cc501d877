"""Widens what must not be computed in less than float32."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32 or wider: half precisions become float32, float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
