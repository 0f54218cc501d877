"""Configures when a run is measured on held-out data."""

from typing import ClassVar

from pydantic import Field

from mmoe.config.base import Config
from mmoe.config.nature import Nature


class EvaluationConfig(Config):
    """Says when a run is measured on what it has not seen, and on how much of that."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    every_steps: int | None = Field(default=None, gt=0)  # cross-entropy and action error; null: only at the end
    at_end: bool = True  # everything that `mmoe evaluate` measures, once the run has had all its steps
    # Held-out documents of each source that any evaluation looks at, the same choice each time; null: all.
    max_documents: int | None = Field(default=10_000, gt=0)
    # Batches of these in an evaluation within training, the same ones each time; null: all.
    batches: int | None = Field(default=32, gt=0)
