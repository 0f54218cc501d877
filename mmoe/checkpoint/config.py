"""Configures when a run is saved, and how much of that is kept."""

from typing import ClassVar

from pydantic import Field

from mmoe.config.base import Config
from mmoe.config.nature import Nature


class CheckpointConfig(Config):
    """Says how often a run is saved, and how many of its checkpoints are kept."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    every_steps: int = Field(default=1000, gt=0)  # steps from one checkpoint to the next
    keep: int = Field(default=3, gt=0)  # the newest checkpoints that are not deleted

    def due(self, step: int, last_step: int) -> bool:
        """Return whether a checkpoint is written after `step` (1-based) of a run that ends with `last_step`."""
        return step % self.every_steps == 0 or step == last_step
