"""Says which part of a batch's loss a process computes, where several hold the same batch or the same vocabulary.

Shape suffixes: n labels, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor

from mmoe.losses.info_nce import Gather
from mmoe.precision.upcast import upcast
from mmoe.schema.batch import Pairs


def softmax_cross_entropy(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """Compute the cross-entropy of each label, [n] nats, in float32 or wider."""
    return F.cross_entropy(upcast(logits_nV), labels_n, reduction="none")


@dataclass(frozen=True)
class LossShare:
    """Says which share of a batch's losses this process computes.

    A share is (index, count): every `count`-th item from `index` on. The losses for backward of all processes add up to
    the loss of the batch.

    Labeled positions are shared by `labels`; contrastive pairs and action chunks by `items`. A term that several
    processes work out together, each with the whole value, is reported by the one that says so: of the labels with
    `reports_labels`, of the routers with `reports_routing`. `head` makes the logits (None: the model's own),
    `criterion` the loss of each label from them; `gather_pairs` brings the pairs of other processes (`info_nce`).
    """

    labels: tuple[int, int] = (0, 1)
    items: tuple[int, int] = (0, 1)
    reports_labels: bool = True
    reports_routing: bool = True
    head: Callable[[Tensor], Tensor] | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] = softmax_cross_entropy
    gather_pairs: Gather | None = None

    def own_pairs(self, pairs: Pairs) -> Pairs:
        """Choose the pairs that this process computes."""
        return Pairs(*(take_share(getattr(pairs, field.name), self.items) for field in fields(Pairs)))


FULL_SHARE = LossShare()


def take_share(x: Tensor, part: tuple[int, int]) -> Tensor:
    """Return the rows of `x` that a share has: every `count`-th one; `part` is (index, count)."""
    number, of = part
    return x[number::of]
