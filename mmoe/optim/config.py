"""Configures how a run optimizes: its rate, the shape of the rate, the update, the clip."""

from pydantic import model_validator
from rich.table import Table

from mmoe.config.base import Config
from mmoe.config.registry import distinct
from mmoe.optim.adamw import AdamWConfig, ClipConfig
from mmoe.optim.batch import BatchArithmetic
from mmoe.optim.lr import LearningRateConfig
from mmoe.optim.optimizer import ChosenOptimizer
from mmoe.optim.schedule import Schedule, ScheduleConfig


class OptimConfig(Config):
    """Configures the optimizers, the learning rate and its schedule, and clipping."""

    lr: LearningRateConfig
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: ChosenOptimizer = AdamWConfig()  # of all parameters that `matrices` does not take
    matrices: ChosenOptimizer | None = None  # of the matrices of the blocks; null: `optimizer` for everything
    clip: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _two(self) -> "OptimConfig":
        distinct(tuple(each for each in (self.optimizer, self.matrices) if each is not None))
        return self

    def build_schedule(self, batch: BatchArithmetic) -> Schedule:
        """Build the schedule of the learning rate of every step of a run with this batch."""
        return self.schedule.build(self.lr.scaled_peak(batch.global_batch_positions), batch)

    def describe(self, batch: BatchArithmetic) -> Table:
        """Make the table of what is derived, with its formula, to be printed at the start of a run."""
        schedule, reference = self.build_schedule(batch), self.lr.reference_batch_positions
        rule = "optim.lr.peak"
        if reference is not None:
            ratio = f"{batch.global_batch_positions:,} / {reference:,}"
            rule = f"{self.lr.peak:g} x ({ratio}) ** {self.lr.exponent:g}, {self.lr.scaling_rule}"
        table = Table("optimization", "value", "from", title_justify="left")
        table.columns[1].justify = "right"
        table.add_row("peak rate", f"{schedule.peak:.3g}", rule)
        table.add_row("last rate", f"{schedule(batch.iterations - 1):.3g}", f"{schedule.kind} over the run's steps")
        for name in ("warmup", "hold", "decay"):
            span, steps = getattr(self.schedule, name), getattr(schedule, name)
            if span is not None:
                positions = steps * batch.global_batch_positions
                share = f"{positions:,} positions, {steps / batch.iterations:.2%} of the run"
                table.add_row(f"{name} steps", f"{steps:,}", share)
        return table
