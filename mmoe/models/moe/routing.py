"""What the routers did over the steps since the last record, as figures for `metrics.jsonl`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics
from mmoe.schema.sample import Modality

BY_EXPERT = ("expert_load", "expert_importance", "router_grad_norm")  # drawn by TensorBoard, a curve for each expert


class RoutingWindow:
    """A running sum of routing statistics; empty for dense models."""

    def __init__(self) -> None:
        self.sum: RoutingStatistics | None = None

    def add(self, statistics: RoutingStatistics | None) -> None:
        """Add the statistics of a step; None adds nothing."""
        if statistics is not None:
            self.sum = statistics if self.sum is None else self.sum + statistics

    def merge(self, other: "RoutingWindow") -> None:
        """Add all that another window holds."""
        self.add(other.sum)

    def record(self, sources: list[str]) -> dict[str, Any]:
        """JSON-able figures by MoE layer, counted from 0 among them; `sources` are the names by number.

        Loads and drops are counts of choices, loads before any drop: `expert_load` by expert, and
        `expert_load_by_source` by source, modality and expert (where there are any), `expert_drops` alike.
        `would_drop` counts what each of the `capacity_factors` would drop. The others are means over tokens.
        """
        if self.sum is None:
            return {}
        total = self.sum
        load, drops = total.load_NMSE.sum((1, 2)), total.drops_NMSE.sum((1, 2))
        return {
            "expert_load": dict(enumerate(load.tolist())),
            "expert_drops": dict(enumerate(drops.tolist())),
            "expert_load_by_source": _by_source(total.load_NMSE, sources),
            "expert_drops_by_source": _by_source(total.drops_NMSE, sources),
            "expert_importance": dict(enumerate((total.importance_NE / total.tokens_N[:, None]).tolist())),
            "capacity_factors": CAPACITY_FACTORS,
            "would_drop": dict(enumerate(total.would_drop_NC.tolist())),
            "router_logit_mean": dict(enumerate(total.logit_mean_NE.tolist())),
            "router_logit_variance": dict(enumerate(total.logit_variance_NE.tolist())),
            "router_entropy": (total.entropy_N / total.tokens_N).tolist(),
            "load_max_over_mean": (load.amax(1) / load.double().mean(1)).tolist(),
            "drop_rate": float(drops.sum() / load.sum()),
        }


def router_gradients(norms_NE: Tensor | None) -> dict[str, Any]:
    """`router_grad_norm`: by MoE layer, the gradient norm of each expert's router weights, before clipping."""
    return {} if norms_NE is None else {"router_grad_norm": dict(enumerate(norms_NE.tolist()))}


def by_expert(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """("router_grad_norm/layer0/expert3", value) of every figure of a record that is by layer and expert."""
    for key in BY_EXPERT:
        for layer, values in record.get(key, {}).items():
            yield from ((f"{key}/layer{layer}/expert{expert}", value) for expert, value in enumerate(values))


def _by_source(table_NMSE: Tensor, sources: list[str]) -> dict[int, dict[str, dict[str, list[int]]]]:
    """{layer: {source: {modality: [E]}}} without the cells that are zero for every expert."""
    found: dict[int, dict[str, dict[str, list[int]]]] = {layer: {} for layer in range(len(table_NMSE))}
    for layer, kind, source in table_NMSE.any(-1).nonzero().tolist():
        cells = found[layer].setdefault(sources[source], {})
        cells[Modality(kind).name.lower()] = table_NMSE[layer, kind, source].tolist()
    return found
