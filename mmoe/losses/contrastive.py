"""Symmetric InfoNCE between the two sides of contrastive pairs.

Shape suffixes: P pairs, E embedding width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.data.batch import Pairs
from mmoe.precision.widen import widen


@dataclass(frozen=True)
class InfoNCE:
    """`items_P`: loss of each pair, with gradient; exactly zero for a pair without a negative.

    Detached: `correct_P2` bool, whether the partner scores strictly above every negative, seen from either
    side; `negatives_P` i64, how many negatives a pair has; `masked` i64, how many ordered pairs of pairs were
    not compared because their captions are the same.
    """

    items_P: Tensor
    correct_P2: Tensor
    negatives_P: Tensor
    masked: Tensor


def info_nce(left_PE: Tensor, right_PE: Tensor, pairs: Pairs, tau: float) -> InfoNCE:
    """InfoNCE (van den Oord et al. 2018), symmetric as in CLIP (Radford et al. 2021), of cosines over `tau`.

    The negatives of a pair are the other pairs of its contrastive group whose caption differs (`Pairs.group`,
    `Pairs.text_hash`). A pair's loss is the mean of both directions. P >= 1.
    """
    with torch.autocast(left_PE.device.type, enabled=False):
        left, right = F.normalize(widen(left_PE), dim=1), F.normalize(widen(right_PE), dim=1)
        scores = left @ right.T / tau
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    grouped = pairs.group[:, None] == pairs.group
    same_text = pairs.text_hash[:, None] == pairs.text_hash
    negative = grouped & ~same_text
    scores = scores.masked_fill(~(negative | itself), -torch.inf)
    partner = torch.arange(len(scores), device=scores.device)
    items = (_nll(scores, partner) + _nll(scores.T, partner)) / 2
    with torch.no_grad():
        positive, others = scores.diagonal(), scores.masked_fill(itself, -torch.inf)
        correct = torch.stack([positive > others.amax(1), positive > others.amax(0)], dim=1)
        return InfoNCE(items, correct, negative.sum(1), (grouped & same_text & ~itself).sum())


def _nll(scores: Tensor, partner: Tensor) -> Tensor:
    return F.cross_entropy(scores, partner, reduction="none")
