"""The router: which experts a token goes to, and with what weight.

Shape suffixes, here and in the other files of this folder: T tokens (no padding among them), D model width,
E experts, K experts per token, R rows (places of tokens at experts), B sequences.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.precision.widen import widen


@dataclass(frozen=True)
class Routing:
    """What the router decided, in float32 or wider; the K choices of a token are in falling order of score."""

    logits_TE: Tensor
    scores_TE: Tensor  # softmax over the experts
    expert_TK: Tensor  # i64
    score_TK: Tensor  # of the chosen experts
    weight_TK: Tensor  # with which their outputs are added


class Router(nn.Module):
    """Top-k of a softmax over the experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024).

    Of two experts with the same score the one with the lower number wins, on every device. With `normalise` the
    weights of a token are divided by their sum, which is at least K / E and needs no epsilon; `scale` multiplies
    them.
    """

    def __init__(self, size: int, experts: int, top_k: int, normalise: bool, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.top_k, self.normalise, self.scale = top_k, normalise, scale

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = F.linear(widen(x_TD), widen(self.weight))
        scores = logits.softmax(dim=-1)
        expert = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        score = scores.gather(1, expert)
        weight = score / score.sum(dim=-1, keepdim=True) if self.normalise else score
        return Routing(logits, scores, expert, score, weight * self.scale)
