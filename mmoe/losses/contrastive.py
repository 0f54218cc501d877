"""Computes InfoNCE between the two sides of contrastive pairs, as a term of the objective."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from mmoe.config.base import Config
from mmoe.losses.cached import CachedInfoNCE, Embedded, cache
from mmoe.losses.info_nce import info_nce
from mmoe.losses.loss_share import LossShare
from mmoe.losses.term import Items, LossContext, LossTerm, TermSums
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality


class ContrastiveConfig(Config):
    """Configures InfoNCE between the two sides of contrastive pairs."""

    weight: float = Field(default=0.1, ge=0)  # of the term in the loss; 0: no pair is embedded
    tau: float = Field(default=0.07, gt=0)  # that cosines are divided by
    group_sequences: int | None = Field(default=None, gt=0)  # sequences that share negatives; null: the global batch

    def build(self) -> LossTerm:
        """Build the term ``contrastive``."""
        return ContrastiveTerm(self)


class ContrastiveTerm(LossTerm):
    """Counts the InfoNCE loss of every pair; by modality it is that of the side that is not text.

    Its events are the ``pairs``, those ``compared`` (they have a negative), the ``correct`` among them (mean of both
    directions), and ``same_text``: ordered pairs of pairs that were not compared.
    """

    title = "InfoNCE"
    event_names = ("pairs", "compared", "correct", "same_text")

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__("contrastive", config.weight)
        self.tau, self.couples = config.tau, config.weight > 0

    def denominator(self, counts: Counts, sequences: int) -> float:
        """Count the pairs."""
        return counts.pairs

    def embed(self, context: LossContext) -> Embedded:
        """Keep the two sides of this process's pairs."""
        pairs = context.part.own_pairs(context.batch.pairs)
        return Embedded(*context.model.contrast(context.hidden_BLD, pairs, context.batch.modality), pairs)

    def prepass(self, embedded: Sequence[Embedded], part: LossShare) -> list[CachedInfoNCE]:
        """Work out the losses of all micro-batches' pairs and their gradients by embedding."""
        return cache(embedded, self.tau, part.gather_pairs)

    def compute(self, context: LossContext) -> TermSums | None:
        """Sum up the losses of this process's pairs."""
        batch = context.batch
        pairs = context.part.own_pairs(batch.pairs)
        # By the plan, not by what is here: every rank must use the heads that any rank uses, be it on nothing.
        if not context.planned and not len(pairs.group):
            return None
        left, right = context.model.contrast(context.hidden_BLD, pairs, batch.modality)
        gather = context.part.gather_pairs
        nce = context.cached(left, right) if context.cached else info_nce(left, right, pairs, self.tau, gather)
        compared = nce.negatives_P > 0
        first, second = pairs.modality.unbind(1)
        other_side = torch.where(first == Modality.TEXT, second, first)
        events = {
            "pairs": torch.full_like(nce.masked, len(compared)),
            "compared": compared.sum(),
            "correct": (nce.correct_P2 & compared[:, None]).double().sum() / 2,
            "same_text": nce.masked,
        }
        items = Items(nce.items_P, torch.ones_like(nce.items_P), pairs.span[:, 0, 0], other_side)
        return TermSums(nce.items_P.sum(), items, events)

    def figures(self, events: Mapping[str, float]) -> dict[str, float]:
        """Give the accuracy among those compared, and how many pairs there were and could not be compared."""
        accuracy = {"accuracy": events["correct"] / events["compared"]} if events["compared"] else {}
        return accuracy | {
            "pairs": events["pairs"],
            "without_negative": events["pairs"] - events["compared"],
            "same_text": events["same_text"],
        }
