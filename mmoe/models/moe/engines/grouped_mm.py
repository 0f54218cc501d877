"""Provides torch's grouped product, fused with the gradients of a SwiGLU network.

Shape suffixes as in `mmoe.models.moe.engines.engine`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.compat import GROUPED_MM
from mmoe.models.moe.engines.engine import ExpertEngine


class GroupedMMEngine(ExpertEngine):
    """Multiplies all groups in one call, on a CPU and on a GPU."""

    multiple = 8  # widths are multiples of 16 bytes in bfloat16
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    saved_ops = frozenset({GROUPED_MM.default})

    def swiglu(self, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute the experts by three grouped products, [R, D] -> [R, D]."""
        return _GroupedSwiGLU.apply(x_RD, gate_EDF, up_EDF, down_EFD, ends_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """Keeps two products and computes what follows them again, in three [R, F] of its own.

    At these sizes a fresh [R, F] costs more than the arithmetic on it (page faults on a CPU, memory on a GPU), and
    on a CPU in bfloat16 a product in place takes twice the time of one into another tensor.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        gate_RF, up_RF = F.grouped_mm(x_RD, gate_EDF, offs=ends_E), F.grouped_mm(x_RD, up_EDF, offs=ends_E)
        ctx.save_for_backward(x_RD, gate_EDF, up_EDF, down_EFD, ends_E, gate_RF, up_RF)
        return F.grouped_mm(F.silu(gate_RF) * up_RF, down_EFD, offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_RD, gate_EDF, up_EDF, down_EFD, ends_E, gate_RF, up_RF = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()  # the kernel refuses expanded gradients
        silu_RF = F.silu(gate_RF)
        hidden_RF = silu_RF * up_RF
        down_grad = F.grouped_mm(hidden_RF.mT, grad_RD, offs=ends_E)
        hidden_grad = F.grouped_mm(grad_RD, down_EFD.mT, offs=ends_E)
        up_grad = torch.mul(silu_RF, hidden_grad, out=hidden_RF)
        silu_grad = torch.mul(hidden_grad, up_RF, out=silu_RF)
        gate_grad = torch.ops.aten.silu_backward.grad_input(silu_grad, gate_RF, grad_input=hidden_grad)
        x_grad = F.grouped_mm(gate_grad, gate_EDF.mT, offs=ends_E).add_(F.grouped_mm(up_grad, up_EDF.mT, offs=ends_E))
        gate_up_grad = F.grouped_mm(x_RD.mT, gate_grad, offs=ends_E), F.grouped_mm(x_RD.mT, up_grad, offs=ends_E)
        return x_grad, *gate_up_grad, down_grad, None
