"""Configures when a run is saved, and how much of that is kept."""

from typing import ClassVar

from pydantic import Field

from mmoe.config.base import Config
from mmoe.config.nature import Nature


class CheckpointConfig(Config):
    """Says how often a run is saved, and how many of its checkpoints are kept."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    every_steps: int | None = Field(default=1000, gt=0)  # after every so many steps of the run; null: not by steps
    every_minutes: float | None = Field(default=None, gt=0)  # so long after the last one; null: not by time
    keep: int = Field(default=3, gt=0)  # the newest checkpoints that are not deleted

    def due(self, step: int, last_step: int) -> bool:
        """Return whether a checkpoint is written after `step` (1-based) of a run that ends with `last_step`."""
        return step == last_step or (self.every_steps is not None and step % self.every_steps == 0)

    def late(self, seconds: float) -> bool:
        """Return whether a checkpoint is written because the last one is so many `seconds` old."""
        return self.every_minutes is not None and seconds >= 60 * self.every_minutes
