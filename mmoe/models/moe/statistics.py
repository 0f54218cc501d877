"""Defines what the routers did, as sums: over batches and ranks they only add.

Shape suffixes: N layers of experts, M modalities, S sources, E experts, C capacity factors; the others as in
`mmoe.models.moe.router`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.models.moe.dispatch import Placed
from mmoe.models.moe.router import Router, Routing
from mmoe.models.moe.rows import count
from mmoe.models.moe.tokens import Tokens
from mmoe.schema.modality import Modality

CAPACITY_FACTORS = tuple(n / 20 for n in range(20, 41))  # 1.00, 1.05, ... 2.00


@dataclass(frozen=True)
class RoutingStatistics:
    """Holds sums over valid tokens by layer of experts (N), modality (M), source (S) and expert (E).

    `load_NMSE` i64 counts the slots of each expert before any drop, `drops_NMSE` i64 those dropped;
    `would_drop_NC` i64 those that a capacity per sequence would drop, at each of the C `CAPACITY_FACTORS`, in
    whatever mode the layer runs; `tokens_N` i64. In f64, by expert: the sum of its logits, of their squares, and of
    its probabilities (its importance); `entropy_N` is the sum of the entropies (nats) of the tokens' probabilities.
    """

    load_NMSE: Tensor
    drops_NMSE: Tensor
    would_drop_NC: Tensor
    tokens_N: Tensor
    logit_NE: Tensor
    logit_square_NE: Tensor
    importance_NE: Tensor
    entropy_N: Tensor

    @classmethod
    @torch.no_grad()
    def from_routing(
        cls, routing: Routing, permutation: Placed, tokens: Tokens, load_BE: Tensor
    ) -> "RoutingStatistics":
        """Sum up the routing of one layer (N = 1), `load_BE` its `expert_load`. Nothing here waits for the device."""
        logits, probability, expert_TK = routing.logits_TE, routing.probability_TE, routing.expert_TK
        experts, top_k = logits.shape[1], expert_TK.shape[1]
        shape = (1, len(Modality), tokens.sources, experts)
        cells = len(Modality) * tokens.sources * experts
        cell_TK = (tokens.modality_T * tokens.sources + tokens.source_T)[:, None] * experts + expert_TK
        load = count(cell_TK, cells).view(shape)
        capacity_C = capacities(tokens.length, top_k, experts, logits.device)
        return cls(
            load_NMSE=load,
            drops_NMSE=torch.zeros_like(load)
            if permutation.complete
            else count(cell_TK, cells, permutation.dropped_TK).view(shape),
            would_drop_NC=(load_BE[..., None] - capacity_C).clamp_(min=0).sum((0, 1))[None],
            tokens_N=torch.full((1,), len(logits), device=logits.device),
            logit_NE=_wide_sum(logits),
            logit_square_NE=_wide_sum(logits.square()),
            importance_NE=_wide_sum(probability),
            entropy_N=_wide_sum(_entropy(probability)),
        )

    @classmethod
    def stack(cls, layers: list["RoutingStatistics"]) -> "RoutingStatistics":
        """Join the statistics of several layers of the same batch, in their order."""
        return cls(*(torch.cat([getattr(layer, f.name) for layer in layers]) for f in fields(cls)))

    def __add__(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """Add the sums of both; a source that only one side knows counts zero on the other."""
        sources = max(self.load_NMSE.shape[2], other.load_NMSE.shape[2])
        sides = zip(self._with_sources(sources), other._with_sources(sources))
        return RoutingStatistics(*(a + b for a, b in sides))

    def _with_sources(self, sources: int) -> list[Tensor]:
        missing = (0, 0, 0, sources - self.load_NMSE.shape[2])
        tables = [F.pad(self.load_NMSE, missing), F.pad(self.drops_NMSE, missing)]
        return tables + [getattr(self, f.name) for f in fields(self)[2:]]

    @property
    def logit_mean_NE(self) -> Tensor:
        """The mean of each expert's logit over tokens, f64."""
        return self.logit_NE / self.tokens_N[:, None]

    @property
    def logit_variance_NE(self) -> Tensor:
        """The variance of each expert's logit over tokens, f64."""
        return (self.logit_square_NE / self.tokens_N[:, None] - self.logit_mean_NE.square()).clamp(min=0)

    @property
    def drop_rate_N(self) -> Tensor:
        """The share of the slots that were dropped, f64."""
        return self.drops_NMSE.sum((1, 2, 3)).double() / self.load_NMSE.sum((1, 2, 3))

    @property
    def would_drop_rate_NC(self) -> Tensor:
        """The share of the slots that each capacity factor would drop, f64."""
        return self.would_drop_NC.double() / self.load_NMSE.sum((1, 2, 3))[:, None]


def capacities(length: int, top_k: int, experts: int, device: torch.device | str = "cpu") -> Tensor:
    """Compute the rows of one expert for one sequence, ceil(cf * L * K / E) of each of the `CAPACITY_FACTORS`, i64 [C].

    In whole numbers, so that no rounding of the factor adds a row.
    """
    twentieths = torch.arange(20, 20 + len(CAPACITY_FACTORS), device=device)
    return -((-twentieths * length * top_k) // (20 * experts))


def router_gradient_norms(routers: list[Router]) -> Tensor | None:
    """Compute the L2 norm of the gradient of each expert's row of the router weights, f64 [N, E].

    By layer of experts, of the gradients that the parameters hold: call it after the step's last backward pass and
    before they are clipped. Zeros for a router that has none; None for a model without experts.
    """
    if not routers:
        return None
    weights = [router.weight for router in routers]
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return torch.linalg.vector_norm(torch.stack(gradients), dim=-1, dtype=torch.float64)


def _wide_sum(x_TX: Tensor) -> Tensor:
    """Sum over the tokens in f64, [1, X]."""
    return x_TX.sum(0, dtype=torch.float64)[None]


def _entropy(probability_TE: Tensor) -> Tensor:
    """Compute the entropy of each token's probabilities, [T] nats; p log p is 0 at 0.

    Faster than `torch.special.entr`, which has no vector code on a CPU.
    """
    tiny = torch.finfo(probability_TE.dtype).tiny
    return -(probability_TE * probability_TE.clamp(min=tiny).log()).sum(1)
