"""Configures in which precision a run computes, and in which it keeps its weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from mmoe.config.base import Config


class PrecisionConfig(Config):
    """Configures the precision of a run; `compute` is that of the matrix products.

    ======== ================== ===============================================================
    compute  parameters, states  products
    ======== ================== ===============================================================
    float32  float32             float32
    bfloat16 float32             bfloat16 by autocast; norms, softmax and losses stay in float32
    float64  float64             float64: the reference that layouts and kernels are checked against
    ======== ================== ===============================================================
    """

    compute: Literal["float32", "bfloat16", "float64"] = "float32"  # of products and activations; sums are float32

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of parameters, gradients and optimizer states."""
        return torch.float64 if self.compute == "float64" else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return getattr(torch, self.compute)

    def autocast(self, device: torch.device | str) -> AbstractContextManager:
        """Return the context of forward and losses on `device`; backward runs outside it."""
        if self.compute == "bfloat16":
            return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
        return nullcontext()
