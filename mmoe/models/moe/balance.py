"""Keeps a router healthy by losses of its balance at three levels, its z-loss, and the rule that moves its bias.

All levels are E * sum_e f_e P_e (Switch Transformer, Fedus et al. 2021; f divided by K), 1 at perfect balance: f_e
is the share of the slots that fell on expert e (before any drop, no gradient), P_e the mean probability of e.
Sigmoid scores are normalized over the experts first (DeepSeek-V3, 2024, equations 17 to 20). Gradient
descent on it lowers the probability of experts with f_e above their P-weighted mean.

============ ============================================= =================== ======================
level        f                                             P                   the same in
============ ============================================= =================== ======================
sequence     of a sequence                                 of that sequence    every layout
micro_batch  of a micro-batch                              of that micro-batch layouts with equal ones
global_batch of the optimizer step so far, over the ranks  of the micro-batch  layouts with equal ones
============ ============================================= =================== ======================

The wider the level, the more a sequence may keep to the experts of its own subject (Qiu et al. 2025, "Demons in the
Detail"). With the last, f of an early micro-batch knows only those before it, as in that paper.

Shape suffixes as in `mmoe.models.moe.router`; X rows of any kind (sequences or layers).
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from mmoe.compat import foreach_add_
from mmoe.config.base import Config
from mmoe.models.moe.router import Router, Routing
from mmoe.models.moe.rows import count
from mmoe.models.moe.tokens import Tokens


class BalanceConfig(Config):
    """Configures the load-balancing loss by a coefficient for each level; several may act at once, 0 leaves one out."""

    sequence: float = Field(default=0.01, ge=0)  # weight of the balance within each sequence
    micro_batch: float = Field(default=0.0, ge=0)  # within a micro-batch
    global_batch: float = Field(default=0.0, ge=0)  # within the global batch


def router_losses(config: BalanceConfig) -> tuple[str, ...]:
    """Name the losses of routers that are worked out, in the order in which they are added up."""
    return (*(f"balance_{level}" for level, weight in config if weight), "router_z")


class ExpertLoadAccumulator:
    """Counts how often each expert was chosen in the optimizer step so far, before any drop.

    The loads of all layers are one tensor, so summing them over data ranks is one reduction. `reduce` does that:
    [N, E] i64 of this rank -> the sum over ranks, a new tensor. Every rank must come to `total` equally often.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] = lambda load_NE: load_NE) -> None:
        self._reduce = reduce
        self._load_NE: Tensor | None = None

    def add(self, load_NE: Tensor) -> None:
        """Add the loads of a micro-batch of this rank."""
        self._load_NE = load_NE if self._load_NE is None else self._load_NE + load_NE

    @classmethod
    def join(cls, parts: "list[ExpertLoadAccumulator]") -> "ExpertLoadAccumulator":
        """Make one accumulator of the layers of several, in that order; a part to which nothing was added has none."""
        joined = cls(parts[0]._reduce)
        if added := [part._load_NE for part in parts if part._load_NE is not None]:
            joined.add(torch.cat(added))
        return joined

    def total(self) -> Tensor:
        """Return the loads of all ranks, i64 [N, E]. Raises ValueError where nothing was added."""
        if self._load_NE is None:
            raise ValueError("no loads were counted in this step; add those of a micro-batch first")
        return self._reduce(self._load_NE)


def expert_load(routing: Routing, tokens: Tokens) -> Tensor:
    """Count how often each sequence chose each expert, i64 [B, E]."""
    experts = routing.logits_TE.shape[1]
    cell_TK = tokens.sequence_T[:, None] * experts + routing.expert_TK
    return count(cell_TK, tokens.sequences * experts).view(-1, experts)


def expert_probability(routing: Routing, tokens: Tokens) -> Tensor:
    """Sum the experts' probabilities over each sequence's valid tokens, [B, E]."""
    return _sequence_sums(routing.probability_TE, tokens)


def balance_loss(load_XE: Tensor, probability_XE: Tensor) -> Tensor:
    """Compute E * sum_e f_e P_e of the given loads and mean probabilities, [X]; zero where nothing was chosen."""
    share = load_XE.to(probability_XE.dtype) / load_XE.sum(-1, keepdim=True).clamp(min=1)
    return load_XE.shape[-1] * (share * probability_XE).sum(-1)


def z_loss(routing: Routing, tokens: Tokens) -> Tensor:
    """Average logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022) over a sequence's valid tokens, then over sequences."""
    sums = _sequence_sums(routing.logits_TE.logsumexp(1, keepdim=True).square(), tokens)
    return (sums / sequence_counts(tokens)[:, None]).mean()


@torch.no_grad()
def update_expert_bias(routers: list[Router], load_NE: Tensor, rate: float) -> None:
    """Raise the bias of the experts that a step chose less than the mean of their layer, lower that of the others.

    bias += rate * sign(mean load - load): Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing"; DeepSeek-V3.
    `load_NE` are the loads of the step over all ranks, a row for each router. The comparison is one of integers.
    """
    load_NE = load_NE.detach()
    above = load_NE.sum(1, keepdim=True) - load_NE.shape[1] * load_NE
    biases = [router.expert_bias for router in routers if router.expert_bias is not None]
    steps: tuple[Tensor, ...] = (rate * above.sign()).to(biases[0].dtype).unbind()
    foreach_add_(biases, steps)


def sequence_counts(tokens: Tokens) -> Tensor:
    """Count the valid tokens of each sequence, [B]; at least 1."""
    return count(tokens.sequence_T, tokens.sequences).clamp(min=1)


def _sequence_sums(values_TX: Tensor, tokens: Tokens) -> Tensor:
    """Sum over each sequence's valid tokens, [B, X]."""
    return values_TX.new_zeros(tokens.sequences, values_TX.shape[1]).index_add(0, tokens.sequence_T, values_TX)
