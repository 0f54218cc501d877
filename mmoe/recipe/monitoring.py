"""What a run records about itself, and where to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.config.registry import KindConfig, Registry, distinct


@dataclass(frozen=True)
class SinkContext:
    """Says whose records a sink is to take: the run's `folder`, and its whole `config` as plain values."""

    folder: Path
    config: dict[str, Any]


class SinkConfig(KindConfig):
    """Configures a sink, which every `StepRecord` of a run is given to; the base of each kind's config."""

    def build(self, context: SinkContext) -> Any:
        """Build the sink, a `mmoe.monitoring.sinks.Sink`; on the first rank alone. Raises OutputError, BackendError."""
        raise NotImplementedError


SINKS = Registry(
    "sink",
    "mmoe.sinks",
    SinkConfig,
    {
        "jsonl": "mmoe.monitoring.sinks.jsonl:JsonlConfig",
        "arrays": "mmoe.monitoring.sinks.arrays:ArraysConfig",
        "tensorboard": "mmoe.monitoring.sinks.tensorboard:TensorboardConfig",
        "wandb": "mmoe.monitoring.sinks.wandb:WandbConfig",
        "trackio": "mmoe.monitoring.sinks.trackio:TrackioConfig",
    },
)

Sinks = Annotated[
    tuple[Annotated[SerializeAsAny[SinkConfig], BeforeValidator(SINKS)], ...],
    AfterValidator(distinct),
]


class MonitoringConfig(Config):
    """Says what a run records about itself, how often, and where to."""

    nature: ClassVar[Nature] = Nature.OPERATIONAL

    log_every_steps: int = Field(default=10, gt=0)  # scalars
    tables_every_steps: int = Field(default=20, gt=0)  # routing by layer, expert, modality and source
    sinks: Sinks | None = None  # null: jsonl, arrays, and tensorboard where it is installed
    digest_steps: tuple[int, ...] = ()  # steps after which a digest of weights and optimizer states is logged
    # Operations per second of one device in the compute precision, which `mfu` refers to; null: that of a known GPU.
    peak_flops: float | None = Field(default=None, gt=0)
