"""The experts: one SwiGLU network each, and the engines that multiply groups of rows with their weights.

Shape suffixes: R rows sorted by expert, E experts, D model width, F hidden width; `ends_E` (i32) are the rows
before which each expert's group ends, the last one R.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.models.dtypes import compute_dtype
from mmoe.optional import require

Engine = Literal["grouped_mm", "loop", "megablocks", "transformer_engine"]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_RD, weight_EDF, ends_E -> [R, F]
KEY = "model.moe.engine"
GROUPED_MM_MULTIPLE = 8  # widths are multiples of 16 bytes in bfloat16


def grouped_mm(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """One call for all groups. Raises ConfigError in float64, which the kernel does not have."""
    if x_RD.dtype is torch.float64:
        raise ConfigError(f"{KEY} is grouped_mm, which has no float64 kernel; set it to loop")
    return F.grouped_mm(x_RD, weight_EDF, offs=ends_E)


def loop(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The reference: one product a group, in any dtype."""
    return torch.cat([x_nD @ weight_DF for x_nD, weight_DF in zip(x_RD.split(_sizes(ends_E)), weight_EDF)])


def _sizes(ends_E: Tensor) -> list[int]:
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def _megablocks(experts: int, inputs: int, outputs: int) -> Product:
    """MegaBlocks' grouped GEMM: bfloat16 on a GPU, group sizes on the host."""
    require("megablocks", KEY)
    from megablocks import grouped_gemm_util

    def product(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        if x_RD.dtype is not torch.bfloat16:
            raise ConfigError(
                f"{KEY} is megablocks, which multiplies bfloat16 only; set precision to it or engine to loop"
            )
        if len(x_RD) == 0:  # which the kernel refuses; this keeps the zero gradients
            return x_RD @ weight_EDF[0]
        sizes = torch.tensor(_sizes(ends_E), dtype=torch.int64)
        return grouped_gemm_util.ops.gmm(x_RD.contiguous(), weight_EDF.contiguous(), sizes)

    return product


def _transformer_engine(experts: int, inputs: int, outputs: int) -> Product:
    """Transformer Engine's GroupedLinear on our weights; in FP8 it needs groups of a multiple of 16 rows.

    It lends the kernels and keeps the FP8 scales. Its own weights are never made: ours take their names in each call.
    """
    require("transformer-engine", KEY)
    from transformer_engine.pytorch import GroupedLinear

    linear = GroupedLinear(experts, inputs, outputs, bias=False, device="meta")

    def product(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        weights = weight_EDF.mT.contiguous().unbind(0)  # it has [outputs, inputs]
        names = {f"weight{number}": weight for number, weight in enumerate(weights)}
        return torch.func.functional_call(linear, names, (x_RD, _sizes(ends_E)))

    return product


ENGINES: dict[Engine, Callable[[int, int, int], Product]] = {
    "grouped_mm": lambda experts, inputs, outputs: grouped_mm,
    "loop": lambda experts, inputs, outputs: loop,
    "megablocks": _megablocks,
    "transformer_engine": _transformer_engine,
}


class Experts(nn.Module):
    """E SwiGLU networks: down(silu(gate(x)) * up(x)), each over its own group of rows.

    Raises BackendError where the engine's package is not available.
    """

    def __init__(self, experts: int, size: int, hidden: int, engine: Engine) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, size, hidden))
        self.up = nn.Parameter(torch.empty(experts, size, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, size))
        make = ENGINES[engine]
        self.multiply_gate, self.multiply_up = make(experts, size, hidden), make(experts, size, hidden)
        self.multiply_down = make(experts, hidden, size)
        self.fused = engine == "grouped_mm"

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """[R, D] sorted by expert -> [R, D], in the dtype of the products."""
        dtype = compute_dtype(x_RD)
        x = x_RD.to(dtype)
        gate, up, down = (weight.to(dtype) for weight in (self.gate, self.up, self.down))
        if self.fused:
            return _GroupedSwiGLU.apply(x, gate, up, down, ends_E)
        hidden = F.silu(self.multiply_gate(x, gate, ends_E)) * self.multiply_up(x, up, ends_E)
        return self.multiply_down(hidden, down, ends_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """By `grouped_mm`. Keeps two products and computes what follows them again, in three [R, F] of its own.

    At these sizes a fresh [R, F] costs more than the arithmetic on it (page faults on a CPU, memory on a GPU), and
    on a CPU in bfloat16 a product in place takes twice the time of one into another tensor.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        gate_RF, up_RF = grouped_mm(x_RD, gate_EDF, ends_E), grouped_mm(x_RD, up_EDF, ends_E)
        ctx.save_for_backward(x_RD, gate_EDF, up_EDF, down_EFD, ends_E, gate_RF, up_RF)
        return grouped_mm(F.silu(gate_RF) * up_RF, down_EFD, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_RD, gate_EDF, up_EDF, down_EFD, ends_E, gate_RF, up_RF = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()  # the kernel refuses expanded gradients
        silu_RF = F.silu(gate_RF)
        hidden_RF = silu_RF * up_RF
        down_grad = grouped_mm(hidden_RF.mT, grad_RD, ends_E)
        hidden_grad = grouped_mm(grad_RD, down_EFD.mT, ends_E)
        up_grad = torch.mul(silu_RF, hidden_grad, out=hidden_RF)
        silu_grad = torch.mul(hidden_grad, up_RF, out=silu_RF)
        gate_grad = torch.ops.aten.silu_backward.grad_input(silu_grad, gate_RF, grad_input=hidden_grad)
        x_grad = grouped_mm(gate_grad, gate_EDF.mT, ends_E).add_(grouped_mm(up_grad, up_EDF.mT, ends_E))
        gate_up_grad = grouped_mm(x_RD.mT, gate_grad, ends_E), grouped_mm(x_RD.mT, up_grad, ends_E)
        return x_grad, *gate_up_grad, down_grad, None
