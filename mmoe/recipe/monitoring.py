"""Configures what a run records about itself, and where to."""

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

    owns_files: ClassVar[bool] = False  # of one name in the run's folder: a run has one of the kind at most

    def build(self, context: SinkContext) -> Any:
        """Build the sink, a `mmoe.monitoring.sinks.Sink`, on the first rank alone.

        Raises OutputError where it cannot be opened, PackageError where its package is missing.
        """
        raise NotImplementedError


SINKS = Registry[SinkConfig](
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


def _one_writer(sinks: tuple[SinkConfig, ...]) -> tuple[SinkConfig, ...]:
    kinds = [sink.kind for sink in sinks if sink.owns_files]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"two sinks of kind {twice[0]} would write to the same files; keep one of them")
    return sinks


Sinks = Annotated[
    tuple[Annotated[SerializeAsAny[SinkConfig], BeforeValidator(SINKS)], ...],
    AfterValidator(distinct),
    AfterValidator(_one_writer),
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
