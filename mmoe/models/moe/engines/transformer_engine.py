"""Runs Transformer Engine's GroupedLinear on our weights; in FP8 it needs groups of a multiple of 16 rows.

Shape suffixes as in `mmoe.models.moe.engines.engine`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.models.moe.engines.engine import ExpertEngine, sizes_of


class TransformerEngineEngine(ExpertEngine):
    """Lends Transformer Engine's kernels and keeps the FP8 scales of each of the three products.

    The weights of its own modules are never made: ours take their names in each call.
    """

    requires = ("transformer-engine",)
    multiple = 8
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})

    def __init__(self, experts: int, size: int, hidden: int) -> None:
        super().__init__(experts, size, hidden)
        from transformer_engine.pytorch import GroupedLinear

        shapes = (size, hidden), (size, hidden), (hidden, size)
        self.gate, self.up, self.down = (GroupedLinear(experts, *s, bias=False, device="meta") for s in shapes)

    def swiglu(self, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute the experts by three grouped products, [R, D] -> [R, D]."""
        sizes = sizes_of(ends_E)
        gate_RF, up_RF = _multiply(self.gate, x_RD, gate_EDF, sizes), _multiply(self.up, x_RD, up_EDF, sizes)
        return _multiply(self.down, F.silu(gate_RF) * up_RF, down_EFD, sizes)


def _multiply(linear: Any, x_RD: Tensor, weight_EDF: Tensor, sizes: list[int]) -> Tensor:
    weights = weight_EDF.mT.contiguous().unbind(0)  # it has [outputs, inputs]
    names = {f"weight{number}": weight for number, weight in enumerate(weights)}
    return torch.func.functional_call(linear, names, (x_RD, sizes))
