"""Sums what the routers did over some steps, as tables by layer and as a few scalars.

Shape suffixes as in `mmoe.models.moe.statistics`.
"""

import base64
import zlib
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics


class RoutingWindow:
    """Keeps a running sum of routing statistics; empty for dense models."""

    def __init__(self) -> None:
        self.sum: RoutingStatistics | None = None

    def add(self, statistics: RoutingStatistics | None) -> None:
        """Add the statistics of a step, on whose device the sum is kept; None adds nothing."""
        if statistics is not None:
            self.sum = statistics if self.sum is None else _beside(self.sum, statistics) + statistics

    def merge(self, other: "RoutingWindow") -> None:
        """Add all that another window holds."""
        self.add(other.sum)

    def tables(self) -> dict[str, np.ndarray]:
        """Make tables by MoE layer (N, counted from 0 among them), modality, source and expert; of no step, none.

        `expert_load` and `expert_drops` [N, M, S, E] i64 count slots, loads before any drop. `would_drop` [N, C] i64
        counts what each of the `capacity_factors` [C] would drop. `expert_importance`, `router_logit_mean` and
        `router_logit_variance` [N, E] f32 are means over tokens.
        """
        if self.sum is None:
            return {}
        total = self.sum
        means = {
            "expert_importance": total.importance_NE / total.tokens_N[:, None],
            "router_logit_mean": total.logit_mean_NE,
            "router_logit_variance": total.logit_variance_NE,
        }
        return {
            "expert_load": total.load_NMSE.cpu().numpy(),
            "expert_drops": total.drops_NMSE.cpu().numpy(),
            "would_drop": total.would_drop_NC.cpu().numpy(),
            "capacity_factors": np.array(CAPACITY_FACTORS),
            **{name: mean.float().cpu().numpy() for name, mean in means.items()},
        }

    def scalars(self) -> dict[str, float]:
        """Return the share of slots that was dropped, the worst layer's balance, and the mean entropy in nats."""
        if self.sum is None:
            return {}
        total = self.sum
        load_NE = total.load_NMSE.sum((1, 2)).double()
        return {
            "drop_rate": float(total.drops_NMSE.sum() / total.load_NMSE.sum()),
            "load_max_over_mean": float((load_NE.amax(1) / load_NE.mean(1)).amax()),
            "router_entropy": float((total.entropy_N / total.tokens_N).mean()),
        }

    def slots(self) -> tuple[int, int]:
        """Count all slots, and those that were dropped."""
        return (0, 0) if self.sum is None else (int(self.sum.load_NMSE.sum()), int(self.sum.drops_NMSE.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Give the sums as JSON."""
        return {} if self.sum is None else {f.name: _pack(getattr(self.sum, f.name)) for f in fields(self.sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.sum = RoutingStatistics(**{name: _unpack(packed) for name, packed in state.items()}) if state else None


def _beside(held: RoutingStatistics, other: RoutingStatistics) -> RoutingStatistics:
    """Give what is held on the device of the other: a sum that was loaded comes from a file."""
    device = other.load_NMSE.device
    if held.load_NMSE.device == device:
        return held
    return RoutingStatistics(*(getattr(held, f.name).to(device) for f in fields(held)))


def _pack(tensor: Tensor) -> dict[str, Any]:
    array = tensor.cpu().numpy()
    content = base64.b64encode(zlib.compress(array.tobytes())).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "zlib": content}


def _unpack(packed: dict[str, Any]) -> Tensor:
    content = bytearray(zlib.decompress(base64.b64decode(packed["zlib"])))
    return torch.from_numpy(np.frombuffer(content, packed["dtype"]).reshape(packed["shape"]))
