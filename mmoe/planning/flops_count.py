"""Counts floating-point operations of what runs, by torch's formulas, and by own ones where torch has none."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from mmoe.compat import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, GROUPED_MM


class FlopCount:
    """Counts the operations of matrix products and attention in `total`.

    A causal document counts the half of its square that is computed.
    """

    def __init__(self) -> None:
        self.total = 0

    def note(self, function: Any, arguments: tuple, result: Any) -> None:
        """Count the operations of a call of `function`."""
        packet = getattr(function, "_overloadpacket", None)
        if packet is GROUPED_MM:
            self.total += _grouped_mm(*arguments[:2])
        elif packet is CPU_ATTENTION:
            self.total += 2 * _attention_product(arguments[0], arguments[1], _causal(arguments, 4))
        elif packet is CPU_ATTENTION_BACKWARD:
            # Four products for the gradients, and the scores once more.
            self.total += 5 * _attention_product(arguments[1], arguments[2], _causal(arguments, 7))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*arguments, out_val=result)

    def take(self) -> int:
        """Return the operations since the last call of this."""
        taken, self.total = self.total, 0
        return taken


def _causal(arguments: tuple, at: int) -> bool:
    return len(arguments) > at and bool(arguments[at])


def _grouped_mm(a: torch.Tensor, b: torch.Tensor) -> int:
    """[R, D] @ [E, D, F] by groups of rows, or [D, R] @ [R, F] to [E, D, F]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _attention_product(q: torch.Tensor, k: torch.Tensor, causal: bool) -> int:
    """Of scores, or of values with weights: q [b, H, n, K], k [b, G, m, K]."""
    batch, heads, queries, width = q.shape
    return 2 * batch * heads * queries * k.shape[2] * width // (2 if causal else 1)
