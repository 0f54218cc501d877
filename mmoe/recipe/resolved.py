"""What follows from a run's config on a number of processes, derived once."""

from __future__ import annotations

from dataclasses import dataclass

from mmoe.data.plan.deal import Reach
from mmoe.optim.schedule import Schedule
from mmoe.parallel.mesh import Degrees
from mmoe.parallel.parallelize import check_layout
from mmoe.parallel.pipeline import check_stages
from mmoe.parallel.sequence import check_length
from mmoe.parallel.setting import RankSetting
from mmoe.recipe.config import RunConfig


@dataclass(frozen=True)
class ResolvedRun(RankSetting):
    """Adds to what ranks read what the loop does: the width of a contrastive group in sequences, the rate's schedule.

    The number of steps is `batch.iterations`.
    """

    contrastive_group: int
    schedule: Schedule

    @classmethod
    def of(cls, config: RunConfig, world: int | None = None) -> ResolvedRun:
        """Derive it for `world` processes of a group, or for one without a group, whatever the config's degrees are.

        Raises ConfigError where the degrees, the model or the batch cannot be spread so.
        """
        degrees = Degrees() if world is None else Degrees.of(config.parallel, world)
        check_layout(config.model, degrees)
        check_length(config.data.sequence_length, degrees.cp, degrees.tp)
        batch = config.batch_of(degrees.replicas)
        check_stages(config.model.layers, config.parallel.stages_per_rank, degrees.pp, batch.accumulation)
        return cls(
            config.model,
            config.losses,
            config.parallel,
            config.precision,
            degrees,
            batch,
            reach=Reach.of(config.contrastive_group, batch.micro_batch_sequences, degrees.replicas),
            contrastive_group=config.contrastive_group,
            schedule=config.optim.build_schedule(batch),
        )
