"""What the routers did over the steps since the last record."""

from typing import Any

from mmoe.models.moe.statistics import RoutingStatistics


class RoutingWindow:
    """A running sum of routing statistics; empty for dense models."""

    def __init__(self) -> None:
        self.sum: RoutingStatistics | None = None

    def add(self, statistics: RoutingStatistics | None) -> None:
        if statistics is not None:
            self.sum = statistics if self.sum is None else self.sum + statistics

    def merge(self, other: "RoutingWindow") -> None:
        self.add(other.sum)

    def record(self) -> dict[str, Any]:
        """Flat JSON-able figures by MoE layer, counted from 0 among them: loads, drops, logits, entropy."""
        if self.sum is None:
            return {}
        total = self.sum
        load, drops = total.load_NMSE.sum((1, 2)), total.drops_NMSE.sum((1, 2))
        return {
            "expert_load": dict(enumerate(load.tolist())),
            "expert_drops": dict(enumerate(drops.tolist())),
            "expert_load_by_modality": dict(enumerate(total.load_NMSE.sum(2).tolist())),
            "router_logit_mean": dict(enumerate(total.logit_mean_NE.tolist())),
            "router_logit_variance": dict(enumerate(total.logit_variance_NE.tolist())),
            "router_entropy": (total.entropy_N / total.tokens_N).tolist(),
            "load_max_over_mean": (load.amax(1) / load.double().mean(1)).tolist(),
            "drop_rate": float(drops.sum() / load.sum()),
        }
