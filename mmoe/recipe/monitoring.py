"""What a run records about itself."""

from typing import ClassVar

from pydantic import Field

from mmoe.config.base import Config
from mmoe.config.nature import Nature


class MonitoringConfig(Config):
    """Says what a run records about itself, and how often."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    log_every_steps: int = Field(default=10, gt=0)  # metrics.jsonl and TensorBoard
    tensorboard: bool | None = None  # null: where it is installed
    digest_steps: tuple[int, ...] = ()  # steps after which a digest of weights and optimizer states is logged
