"""Squared error of continuous action chunks.

Shape suffixes: M chunks, H steps, A action dimensions.
"""

import torch
from torch import Tensor

from mmoe.precision.widen import widen


def squared_error(predicted_MHA: Tensor, target_MHA: Tensor, mask_MHA: Tensor) -> Tensor:
    """[M]: the squared errors of a chunk's masked-in elements, summed; normalised units, float32 or wider.

    What stands behind a mask of False is never read, be it NaN, and gives no gradient.
    """
    error = widen(predicted_MHA) - target_MHA
    return torch.where(mask_MHA, error, 0).square().sum((1, 2))
