"""Cross-entropy over the labelled positions of a batch, never holding all their logits at once.

Shape suffixes: B sequences, L positions, N labelled positions, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmoe.losses.part import WHOLE, Part, share
from mmoe.precision.widen import widen
from mmoe.schema.batch import IGNORE

Head = Callable[[Tensor], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """`total`: scalar, the sum of weight * CE, with gradient.

    Detached: `items_N`, the CE of each label in nats, unweighted; `index_N`, its flat position (of B*L).
    """

    total: Tensor
    items_N: Tensor
    index_N: Tensor


def cross_entropy(
    head: Head, hidden_BLD: Tensor, labels_BL: Tensor, weight_BL: Tensor, chunk: int, part: Part = WHOLE
) -> CrossEntropy:
    """CE of `head(hidden)` [N, D] -> [N, V] against the labels of `part` that are not -100, in float32 or wider.

    Only labelled positions reach the head, `chunk` at a time; backward recomputes a chunk's logits, so at no
    time more than [chunk, V] of them exist. The price is the head's forward pass once more.
    """
    index_N = share((labels_BL.flatten() != IGNORE).nonzero().squeeze(1), part.labels)
    hidden_ND = hidden_BLD.flatten(0, 1)[index_N]
    # The sum over no element ties the result to the graph even where a batch has no label.
    total, items = widen(hidden_ND[:0]).sum(), []
    columns = (hidden_ND, labels_BL.flatten()[index_N], weight_BL.flatten()[index_N])
    for rows in zip(*(x.split(chunk) for x in columns), strict=True):
        weighted, losses = checkpoint(
            _chunk, head, part.criterion, *rows, use_reentrant=False, preserve_rng_state=False
        )
        total = total + weighted
        items.append(losses)
    items_N = torch.cat(items) if items else total.new_empty(0)
    return CrossEntropy(total, items_N, index_N)


def _chunk(
    head: Head, criterion: Criterion, hidden_ND: Tensor, labels_N: Tensor, weight_N: Tensor
) -> tuple[Tensor, Tensor]:
    losses_N = criterion(head(hidden_ND), labels_N)
    return (losses_N * weight_N).sum(), losses_N.detach()
