"""Floating-point operations of what runs, by torch's formulas, and of the operations that torch has none for."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlopCount:
    """`total`: of matrix products and attention; a causal document counts the half of its square that is computed."""

    def __init__(self) -> None:
        self.total = 0

    def note(self, function: Any, arguments: tuple, result: Any) -> None:
        """Count what was called."""
        packet = getattr(function, "_overloadpacket", None)
        if packet is torch.ops.aten._grouped_mm:
            self.total += _grouped_mm(*arguments[:2])
        elif packet is ATTENTION:
            self.total += 2 * _attention_product(*arguments[:3], causal=_causal(arguments, 4))
        elif packet is ATTENTION_BACKWARD:
            # Four products for the gradients, and the scores once more.
            self.total += 5 * _attention_product(*arguments[1:4], causal=_causal(arguments, 7))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*arguments, out_val=result)

    def take(self) -> int:
        """What was counted since the last call."""
        taken, self.total = self.total, 0
        return taken


def _causal(arguments: tuple, at: int) -> bool:
    return len(arguments) > at and bool(arguments[at])


def _grouped_mm(a: torch.Tensor, b: torch.Tensor) -> int:
    """[R, D] @ [E, D, F] by groups of rows, or [D, R] @ [R, F] to [E, D, F]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _attention_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> int:
    """Of scores, or of values with weights: q [b, H, n, K], k [b, G, m, K]."""
    batch, heads, queries, width = q.shape
    return 2 * batch * heads * queries * k.shape[2] * width // (2 if causal else 1)
