"""Says in which dtype the model multiplies matrices."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products of `x` are computed in: autocast's where it is on, else that of `x`.

    What autocast does not reach (grouped products, the copy that several products share) is cast to it by hand.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
