"""Holds what the ranks of a run read of its config, and what follows from it for their number."""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mmoe.data.plan.assignment import ContrastiveScope
from mmoe.losses.config import LossConfig
from mmoe.losses.total import LossTerms
from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.optim.batch import BatchArithmetic
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import ParallelDims
from mmoe.precision.config import PrecisionConfig


@dataclass(frozen=True)
class RankSetting:
    """Holds the sub-configs that ranks read, their degrees, and the batch that they share.

    `scope` says where the sequences of a contrastive group are. `mmoe.recipe.resolved` makes one of a run's config.
    """

    model: ModelConfig
    losses: LossConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    dims: ParallelDims
    batch: BatchArithmetic
    scope: ContrastiveScope

    @cached_property
    def loss_terms(self) -> LossTerms:
        """Build the terms of the loss, the same on every rank."""
        return self.losses.build()

    def heads(self, inputs: ModelInputs) -> dict[str, nn.Module]:
        """Build the modules of the loss terms that have one, by name."""
        return self.loss_terms.heads(inputs, self.model.d_model)

    @property
    def needs_embedding_pass(self) -> bool:
        """True if contrastive groups are wider than a micro-step.

        All embeddings must then be computed first (GradCache): a step embeds all its micro-batches before any has a
        gradient.
        """
        return self.scope is ContrastiveScope.STEP and any(term.couples for term in self.loss_terms)
