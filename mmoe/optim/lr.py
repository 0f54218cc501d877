"""Configures the peak learning rate, and how it follows the batch."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.config.nature import Nature


class LearningRateConfig(Config):
    """Configures the learning rate at its peak, and the rule that carries it from one batch to another.

    `peak` holds for a batch of `reference_batch_positions`; `scaling_rule` carries it to the run's batch.

    With neither of the two, `peak` is the peak, whatever the batch. With r = batch / reference the rules are
    linear (r), sqrt (r ** 0.5) and power (r ** power). The reference belongs to the same model: a rule
    carries a rate across batches, not across models.
    """

    nature: ClassVar[Nature] = Nature.ADJUSTABLE

    peak: float = Field(gt=0)  # highest rate, at the batch that it was found with
    # The batch that `peak` was found with; null: this one.
    reference_batch_positions: int | None = Field(default=None, gt=0)
    scaling_rule: Literal["linear", "sqrt", "power"] | None = None  # how the peak follows from the batch
    power: float | None = Field(default=None, gt=0, le=1)  # of the batch's ratio, for the rule `power`

    @model_validator(mode="after")
    def _complete(self) -> "LearningRateConfig":
        if (self.reference_batch_positions is None) != (self.scaling_rule is None):
            given, missing = "scaling_rule", "reference_batch_positions"
            if self.scaling_rule is None:
                given, missing = missing, given
            raise ValueError(
                f"optim.lr.{given} is set without optim.lr.{missing}: what the rate does when the batch "
                f"changes needs both; set optim.lr.{missing} too, or neither"
            )
        if (self.scaling_rule == "power") != (self.power is not None):
            raise ValueError(
                "optim.lr.power and optim.lr.scaling_rule: power belong together; "
                "set both (0.6 and 0.75 are usual), or name the rule linear or sqrt"
            )
        return self

    @property
    def exponent(self) -> float:
        """The exponent p of r ** p; 0 where the rate does not follow the batch."""
        if self.scaling_rule is None:
            return 0.0
        return {"linear": 1.0, "sqrt": 0.5}[self.scaling_rule] if self.power is None else self.power

    def scaled_peak(self, batch_positions: int) -> float:
        """Return the peak of a run whose optimizer step holds `batch_positions` (GB_tok)."""
        if self.reference_batch_positions is None:
            return self.peak
        return self.peak * (batch_positions / self.reference_batch_positions) ** self.exponent
