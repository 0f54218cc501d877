"""Defines the router, which chooses the experts that a token goes to, and their weights.

Shape suffixes, here and in the other files of this folder: T tokens (no padding among them), D model width,
E experts, K experts per token, G groups of experts, R rows (places of tokens at experts), B sequences, N layers of
experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.precision.upcast import upcast

Score = Literal["softmax", "softmax_topk", "sigmoid"]
GroupScore = Literal["top2", "max"]


@dataclass(frozen=True)
class GroupLimit:
    """Limits the experts of a token to `topk_group` of `n_group` groups of neighbors, all of the same size.

    A group counts by the sum of its two best experts (`top2`: DeepSeek-V3, 2024, section 2.1.2) or by its best
    (`max`: DeepSeek-V2, 2024, section 2.2.2). Where groups stand on nodes, so many nodes at most get a token.
    """

    n_group: int
    topk_group: int
    score: GroupScore = "top2"


@dataclass(frozen=True)
class Routing:
    """Holds what the router decided, in float32 or wider; a token's K choices begin with the one it wanted most."""

    logits_TE: Tensor
    scores_TE: Tensor  # softmax over the experts, or sigmoid of each
    probability_TE: Tensor  # the scores over their sum: the same for softmax
    expert_TK: Tensor  # i64
    score_TK: Tensor  # of the chosen experts
    weight_TK: Tensor  # with which their outputs are added


class Router(nn.Module):
    """Chooses the top k of E experts for every token, and their weights.

    ============ ================================ ==================================================
    score        of an expert                     weights of the chosen experts
    ============ ================================ ==================================================
    softmax      softmax over all experts         their scores (Shazeer et al. 2017)
    softmax_topk softmax over all experts         softmax over the chosen (Mixtral, Jiang et al. 2024)
    sigmoid      sigmoid of its own logit         their scores (DeepSeek-V3, 2024)
    ============ ================================ ==================================================

    With `normalize` a token's weights are divided by their sum; `softmax` then is `softmax_topk`. The division is
    a softmax over the logarithms of the scores, so it needs no epsilon: the weights add up to `scale` even where
    every score has underflowed.

    Experts are chosen by logit, and with a bias or groups by score + bias. Of two equal ones the lower number wins,
    on every device; so does the lower of two equal groups. Noise on the logits is for the choice only: the weights
    are those of the clean logits.

    With `biased` there is a buffer `expert_bias` [E], added to the scores for the choice only; training moves it
    (`balance.update_expert_bias`), never a gradient.

    A logit that is not finite makes the weights of its token NaN and leaves the choices valid indices: looking for one
    here would make every layer wait for the device. The trainer names the layer when the gradient norm tells it.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        size: int,
        experts: int,
        top_k: int,
        normalize: bool,
        scale: float,
        score: Score = "softmax",
        groups: GroupLimit | None = None,
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.top_k, self.scale = top_k, scale
        self.sigmoid, self.normalize = score == "sigmoid", normalize or score == "softmax_topk"
        self.groups = groups
        self.register_buffer("expert_bias", torch.zeros(experts) if biased else None)

    def forward(
        self,
        x_TD: Tensor,
        join: Callable[[Tensor], Tensor] = lambda logits_TE: logits_TE,
        noise_TE: Tensor | None = None,
    ) -> Routing:
        """Route whole sequences: choose the experts of their tokens.

        `x_TD`: the hidden states of the tokens that are here. `join` makes the logits of all tokens of the sequences of
        those that are here. `noise_TE`: added to the logits for the choice only.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = join(F.linear(upcast(x_TD), upcast(self.weight)))
        log_scores = F.logsigmoid(logits) if self.sigmoid else logits  # of a softmax, up to a constant of the token
        probability = log_scores.softmax(dim=-1)
        scores = logits.sigmoid() if self.sigmoid else probability
        expert = self._choose(logits.detach() if noise_TE is None else logits.detach() + noise_TE)
        score = scores.gather(1, expert)
        weight = log_scores.gather(1, expert).softmax(dim=-1) if self.normalize else score
        return Routing(logits, scores, probability, expert, score, weight * self.scale)

    def _choose(self, value_TE: Tensor) -> Tensor:
        """Choose the experts by these values, i64 [T, K]."""
        if self.expert_bias is not None or self.groups is not None:
            value_TE = value_TE.sigmoid() if self.sigmoid else value_TE.softmax(dim=-1)
        if self.expert_bias is not None:
            value_TE = value_TE + self.expert_bias
        if self.groups is not None:
            value_TE = _limit(value_TE, self.groups)
        return _best(value_TE, self.top_k)


def _limit(value_TE: Tensor, groups: GroupLimit) -> Tensor:
    """Keep the values of each token's best groups; -inf for all others (zero would win over a negative bias)."""
    value_TGE = value_TE.unflatten(1, (groups.n_group, -1))
    counted = min(2, value_TGE.shape[2]) if groups.score == "top2" else 1
    group_TG = value_TGE.topk(counted, dim=2).values.sum(2)
    out = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, _best(group_TG, groups.topk_group), False)
    return value_TGE.masked_fill(out.unsqueeze(2), -torch.inf).flatten(1)


def _best(value_TX: Tensor, number: int) -> Tensor:
    """Find where the highest values stand, [T, number], highest first; of equal ones the first."""
    return value_TX.sort(dim=-1, descending=True, stable=True).indices[:, :number]
