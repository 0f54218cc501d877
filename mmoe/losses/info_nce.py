"""Computes symmetric InfoNCE between the two sides of contrastive pairs.

Shape suffixes: P pairs of this rank, C pairs of all ranks that share its contrastive groups, E embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.precision.upcast import upcast
from mmoe.schema.batch import Pairs

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Rows [P, ...] of this rank -> those of all ranks [C, ...], and where its own begin among them.

All ranks call it equally often, also with P = 0. The gradient of its rows is the sum over the ranks of the gradients
of what it returned to them (all-gather forward, reduce-scatter backward).
"""


TIE_EPS = 64  # cosines that are no further apart than so many units of rounding are equal


@dataclass(frozen=True)
class InfoNCE:
    """Holds the InfoNCE loss of each pair, and how it stood against its negatives.

    `items_P`: loss of each pair, with gradient; exactly zero for a pair without a negative. Detached: `correct_P2`
    bool, whether the partner scores above every negative by more than rounding, seen from either side (one that is
    equal, as the same image twice, is beaten in no layout); `negatives_P` i64, how many negatives a pair has;
    `masked_P` i64, with how many others of its group it was not compared because their captions are the same.
    """

    items_P: Tensor
    correct_P2: Tensor
    negatives_P: Tensor
    masked_P: Tensor

    @property
    def masked(self) -> Tensor:
        """The number of ordered pairs of pairs that were not compared because their captions are the same, i64."""
        return self.masked_P.sum()


def info_nce(left_PE: Tensor, right_PE: Tensor, pairs: Pairs, tau: float, gather: Gather | None = None) -> InfoNCE:
    """Compute InfoNCE (van den Oord et al. 2018), symmetric as in CLIP (Radford et al. 2021), of cosines over `tau`.

    The negatives of a pair are the other pairs of its contrastive group whose caption differs (`Pairs.group`,
    `Pairs.text_hash`), those of other ranks where `gather` brings them. A pair's loss is the mean of both directions:
    its left side among all right ones, its right side among all left ones. Each rank has the items of its own pairs,
    so their sum over ranks is that of one process, and so are the summed gradients.
    """
    group, text, first = pairs.group, pairs.text_hash, 0
    with torch.autocast(left_PE.device.type, enabled=False):
        left, right = F.normalize(upcast(left_PE), dim=1), F.normalize(upcast(right_PE), dim=1)
        if gather is None:
            forward_PC = left @ right.T / tau
            backward_PC = forward_PC.T
        else:
            fields_C2, first = gather(torch.stack([group, text], dim=1))
            sides_C2E, _ = gather(torch.stack([left, right], dim=1))
            forward_PC = left @ sides_C2E[:, 1].T / tau
            backward_PC = right @ sides_C2E[:, 0].T / tau
            group, text = fields_C2.unbind(1)
    partner = torch.arange(first, first + len(left), device=left.device)
    itself = partner[:, None] == torch.arange(len(group), device=left.device)
    grouped = pairs.group[:, None] == group
    same_text = pairs.text_hash[:, None] == text
    negative = grouped & ~same_text
    directions = [scores.masked_fill(~(negative | itself), -torch.inf) for scores in (forward_PC, backward_PC)]
    losses = (F.cross_entropy(scores, partner, reduction="none") for scores in directions)
    items = sum(losses, start=left.new_zeros(())) / 2
    with torch.no_grad():
        tie = TIE_EPS * torch.finfo(left.dtype).eps / tau
        beaten = [scores < scores.gather(1, partner[:, None]) - tie for scores in directions]
        correct_P2 = torch.stack([(below | itself).all(1) for below in beaten], dim=1)
        return InfoNCE(items, correct_P2, negative.sum(1), (grouped & same_text & ~itself).sum(1))
