"""Derives, once, what follows from a run's config on a number of processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from mmoe.data.plan.assignment import ContrastiveScope
from mmoe.errors import ConfigError
from mmoe.optim.schedule import Schedule
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import DEGREES, ParallelDims
from mmoe.parallel.parallelize import check_layout
from mmoe.parallel.pipeline import check_pipeline_stages
from mmoe.parallel.sequence import check_length
from mmoe.parallel.setting import RankSetting
from mmoe.recipe.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedRun(RankSetting):
    """Adds what the loop reads to what ranks read: the sequences of a contrastive group and the schedule of the rate.

    The number of steps is `batch.iterations`.
    """

    contrastive_group: int
    schedule: Schedule

    @classmethod
    def from_config(cls, config: RunConfig, world: int | None = None) -> ResolvedRun:
        """Derive what follows from `config` for `world` processes of a group.

        None stands for one process without a group, whatever the config's degrees are. Raises ConfigError where the
        degrees, the model or the batch cannot be spread so.
        """
        dims = ParallelDims() if world is None else ParallelDims.from_config(config.parallel, world)
        check_layout(config.model, dims)
        check_length(config.data.sequence_length, dims.cp, dims.tp)
        batch = config.batch_of(dims.replicas)
        check_pipeline_stages(config.model.n_layers, config.parallel.stages_per_rank, dims.pp, batch.accumulation)
        return cls(
            config.model,
            config.losses,
            config.parallel,
            config.precision,
            dims,
            batch,
            scope=ContrastiveScope.narrowest(config.contrastive_group, batch.micro_batch_sequences, dims.replicas),
            contrastive_group=config.contrastive_group,
            schedule=config.optim.build_schedule(batch),
        )

    @classmethod
    def to_measure(cls, config: RunConfig, world: int | None = None) -> ResolvedRun:
        """Derive what follows from `config` for measuring a model that is not trained, on `world` processes.

        The replicas need not share the run's global batch, unlike in `from_config`: the batch is that of one replica.
        Raises ConfigError where the degrees or the model cannot be spread so.
        """
        alone = cls.from_config(config)
        if world is None:
            return alone
        dims, parallel = ParallelDims.from_config(config.parallel, world), config.parallel
        check_layout(config.model, dims)
        check_length(config.data.sequence_length, dims.cp, dims.tp)
        check_pipeline_stages(config.model.n_layers, parallel.stages_per_rank, dims.pp, micro_batches=dims.pp)
        return replace(alone, dims=dims)


def layout_to_measure(config: RunConfig, world: int) -> ParallelConfig:
    """Return the layout in which `world` processes measure a trained run.

    It is the run's own where that fits their number, else plain data parallelism, which is said.
    """
    try:
        ResolvedRun.to_measure(config, world)
    except ConfigError as error:
        logger.info(f"{world} processes measure by data parallelism, since the run's own layout does not fit: {error}")
        of_layout = {*DEGREES, "schedule", "stages_per_rank"}
        return ParallelConfig(**config.parallel.model_dump(exclude=of_layout))
    return config.parallel
