"""Computes the squared error of continuous action chunks.

Shape suffixes: M chunks, H steps, A action dimensions.
"""

import torch
from pydantic import Field
from torch import Tensor

from mmoe.config.base import Config
from mmoe.losses.term import Items, LossContext, LossTerm, TermSums
from mmoe.precision.upcast import upcast
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality


class ActionLossConfig(Config):
    """Configures the squared error of continuous actions."""

    weight: float = Field(default=1.0, ge=0)  # of the term in the loss

    def build(self) -> LossTerm:
        """Build the term ``action``."""
        return ActionTerm("action", self.weight)


class ActionTerm(LossTerm):
    """Counts the squared error of every element of an action chunk that lies inside its recording."""

    title = "action L2"
    by_modality = False  # all are actions

    def denominator(self, counts: Counts, sequences: int) -> float:
        """Count the elements of action targets."""
        return counts.action_elements

    def compute(self, context: LossContext) -> TermSums | None:
        """Sum up the squared errors of this process's chunks."""
        batch = context.batch
        if not context.planned and not len(batch.action_index):
            return None
        index, target, mask = map(context.share, (batch.action_index, batch.action_target, batch.action_mask))
        errors_M = squared_error(context.model.actions(context.hidden_BLD.flatten(0, 1)[index]), target, mask)
        kinds = torch.full_like(index, Modality.ACTION)
        return TermSums(errors_M.sum(), Items(errors_M, mask.sum((1, 2)), index, kinds))


def squared_error(predicted_MHA: Tensor, target_MHA: Tensor, mask_MHA: Tensor) -> Tensor:
    """Sum the squared errors of a chunk's masked-in elements, [M]; normalized units, float32 or wider.

    What stands behind a mask of False is never read, be it NaN, and gives no gradient.
    """
    error = upcast(predicted_MHA) - target_MHA
    return torch.where(mask_MHA, error, 0).square().sum((1, 2))
