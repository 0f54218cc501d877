"""What the routers did, as sums: over batches and ranks they only add."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.data.sample import Modality
from mmoe.models.moe.router import Routing
from mmoe.models.moe.tokens import Tokens


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over valid tokens by layer of experts (N), modality (M), source (S) and expert (E).

    `load_NMSE` i64 counts the choices of each expert before any drop, `drops_NMSE` i64 those dropped;
    `tokens_N` i64. In f64, by expert: the sum of its logits, of their squares, and of its scores (its
    importance); `entropy_N` is the sum of the entropies (nats) of the tokens' scores.
    """

    load_NMSE: Tensor
    drops_NMSE: Tensor
    tokens_N: Tensor
    logit_NE: Tensor
    logit_square_NE: Tensor
    importance_NE: Tensor
    entropy_N: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing, dropped_TK: Tensor, tokens: Tokens) -> "RoutingStatistics":
        """Of one layer (N = 1)."""
        experts = routing.logits_TE.shape[1]
        shape = (1, len(Modality), tokens.sources, experts)
        cell = (tokens.modality_T * tokens.sources + tokens.source_T)[:, None] * experts + routing.expert_TK
        count = len(Modality) * tokens.sources * experts
        logits, scores = routing.logits_TE, routing.scores_TE
        wide = {"dim": 0, "dtype": torch.float64}
        return cls(
            load_NMSE=cell.flatten().bincount(minlength=count).view(shape),
            drops_NMSE=cell[dropped_TK].bincount(minlength=count).view(shape),
            tokens_N=torch.full((1,), len(logits), device=logits.device),
            logit_NE=logits.sum(**wide)[None],
            logit_square_NE=logits.square().sum(**wide)[None],
            importance_NE=scores.sum(**wide)[None],
            entropy_N=torch.special.entr(scores).sum(dtype=torch.float64)[None],
        )

    @classmethod
    def stack(cls, layers: list["RoutingStatistics"]) -> "RoutingStatistics":
        """Of several layers of the same batch, in their order."""
        return cls(*(torch.cat([getattr(layer, f.name) for layer in layers]) for f in fields(cls)))

    def __add__(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """The sum; a source that only one side knows counts zero on the other."""
        sources = max(self.load_NMSE.shape[2], other.load_NMSE.shape[2])
        sides = zip(self._with_sources(sources), other._with_sources(sources))
        return RoutingStatistics(*(a + b for a, b in sides))

    def _with_sources(self, sources: int) -> list[Tensor]:
        missing = (0, 0, 0, sources - self.load_NMSE.shape[2])
        tables = [F.pad(self.load_NMSE, missing), F.pad(self.drops_NMSE, missing)]
        return tables + [getattr(self, f.name) for f in fields(self)[2:]]

    @property
    def logit_mean_NE(self) -> Tensor:
        """Mean of each expert's logit over tokens, f64."""
        return self.logit_NE / self.tokens_N[:, None]

    @property
    def logit_variance_NE(self) -> Tensor:
        """Variance of each expert's logit over tokens, f64."""
        return (self.logit_square_NE / self.tokens_N[:, None] - self.logit_mean_NE.square()).clamp(min=0)

    @property
    def drop_rate_N(self) -> Tensor:
        """Share of the choices that were dropped, f64."""
        return self.drops_NMSE.sum((1, 2, 3)).double() / self.load_NMSE.sum((1, 2, 3))
