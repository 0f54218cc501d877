"""Computes cross-entropy over the labeled positions of a batch, never holding all their logits at once.

Shape suffixes: B sequences, L positions, N labeled positions, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.losses.loss_share import FULL_SHARE, LossShare, take_share
from mmoe.losses.term import Items, LossContext, LossTerm, TermSums
from mmoe.precision.upcast import upcast
from mmoe.schema.batch import IGNORE
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Vocabulary

Head = Callable[[Tensor], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]


class CrossEntropyConfig(Config):
    """Configures the weight of a label by the modality of its target; discrete actions are ACTION labels."""

    text: float = Field(default=1.0, ge=0)  # weight of a text label
    audio: float = Field(default=1.0, ge=0)  # of an audio label
    action: float = Field(default=1.0, ge=0)  # of a discrete action's label
    structure: float = Field(default=1.0, ge=0)  # of a structure token's label
    # Labeled positions whose logits exist at the same time.
    chunk: Annotated[int, Nature.LAYOUT] = Field(default=1024, gt=0)

    def label_weights(self) -> np.ndarray:
        """Return the `loss_weight` of a label by the modality of its target, f32 [modalities]."""
        weights = np.zeros(len(Modality), np.float32)
        for kind in (Modality.TEXT, Modality.AUDIO, Modality.ACTION, Modality.STRUCTURE):
            weights[kind] = getattr(self, kind.name.lower())
        return weights

    def build(self) -> LossTerm:
        """Build the term ``ce``."""
        return CrossEntropyTerm(self)


class CrossEntropyTerm(LossTerm):
    """Counts the cross-entropy of every label in nats; its denominator is the sum of the labels' loss weights."""

    title = "cross-entropy"

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__("ce")
        self.chunk, self._weights = config.chunk, config.label_weights().astype(np.float64)

    def denominator(self, counts: Counts, sequences: int) -> float:
        """Add up the loss weights of the labels."""
        return float(counts.labels @ self._weights)

    def compute(self, context: LossContext) -> TermSums:
        """Sum up the weighted cross-entropy of this process's labels."""
        batch, part = context.batch, context.part
        head = part.head or context.model.logits
        ce = cross_entropy(head, context.hidden_BLD, batch.labels, batch.loss_weight, self.chunk, part)
        kinds = target_modality(batch.labels.flatten()[ce.index_N], context.vocabulary)
        items = Items(ce.items_N, torch.ones_like(ce.items_N), ce.index_N, kinds)
        return TermSums(ce.total, items, reports=part.reports_labels)


def target_modality(labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the modality (u8) of the tokens to be predicted: `Vocabulary.modality_of` where the labels are."""
    return torch.from_numpy(vocabulary.modality_of(labels.cpu().numpy())).to(labels.device)


@dataclass(frozen=True)
class CrossEntropy:
    """Holds the cross-entropy (CE) of a batch's labels, in total and one by one.

    `total`: scalar, the sum of weight * CE, with gradient. Detached: `items_N`, the CE of each label in nats,
    unweighted; `index_N`, its flat position (of B*L).
    """

    total: Tensor
    items_N: Tensor
    index_N: Tensor


def cross_entropy(
    head: Head, hidden_BLD: Tensor, labels_BL: Tensor, weight_BL: Tensor, chunk: int, part: LossShare = FULL_SHARE
) -> CrossEntropy:
    """Compute the cross-entropy of `head(hidden)` [N, D] -> [N, V] against the labels, in float32 or wider.

    Those of `part` that are not -100 count. Only labeled positions reach the head, `chunk` at a time; backward
    recomputes a chunk's logits, so at no time more than [chunk, V] of them exist. The price is the head's forward pass
    once more.
    """
    index_N = take_share((labels_BL.flatten() != IGNORE).nonzero().squeeze(1), part.labels)
    hidden_ND = hidden_BLD.flatten(0, 1)[index_N]
    # The sum over no element ties the result to the graph even where a batch has no label.
    total, items = upcast(hidden_ND[:0]).sum(), []
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
