"""Computes the learning rate as a pure function of the step.

T, the number of steps, is derived and never typed in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.errors import ConfigError
from mmoe.optim.batch import BatchArithmetic


class Stretch(Config):
    """Says how long a stretch of the run is, in one of three units.

    Positions and fractions survive a new batch size.
    """

    steps: int | None = Field(default=None, ge=0)  # as optimizer steps
    positions: int | None = Field(default=None, ge=0)  # or as positions
    fraction: float | None = Field(default=None, ge=0, le=1)  # of the run's steps

    @model_validator(mode="after")
    def _one(self) -> "Stretch":
        given = [name for name in ("steps", "positions", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, positions and fraction, not {' and '.join(given) or 'none'}")
        return self

    def resolve(self, batch: BatchArithmetic) -> int:
        """Convert the span to whole steps, rounded to the nearest."""
        if self.steps is not None:
            return self.steps
        if self.positions is not None:
            return round(self.positions / batch.global_batch_positions)
        assert self.fraction is not None  # one of the three is given
        return round(self.fraction * batch.iterations)


class ScheduleConfig(Config):
    """Configures a warmup to the peak, then one of five shapes; rates are fractions of the peak.

    ========= ============================================================================================
    kind      after the warmup
    ========= ============================================================================================
    cosine    half a cosine down to `minimum`, then constant for `hold`
    linear    a straight line down to `minimum`, then constant for `hold`
    one_cycle as cosine, with a warmup that is half a cosine too (Smith and Topin 2017; the rate only)
    wsd       constant at the peak, and a straight line down to `minimum` over the last `decay`
    constant  constant at the peak
    ========= ============================================================================================
    """

    nature: ClassVar[Nature] = Nature.ADJUSTABLE

    kind: Literal["cosine", "linear", "one_cycle", "wsd", "constant"] = "cosine"  # shape of the decay
    warmup: Stretch = Stretch(fraction=0.02)  # from 0 to the peak
    start: float = Field(default=0.01, ge=0, le=1)  # the least rate of the warmup
    minimum: float = Field(default=0.1, ge=0, le=1)  # the last rate over the peak
    hold: Stretch | None = None  # at the minimum, after the decay
    decay: Stretch | None = None  # of kind wsd: down to the minimum, last

    @model_validator(mode="after")
    def _spans(self) -> "ScheduleConfig":
        if self.hold is not None and self.kind not in ("cosine", "linear", "one_cycle"):
            raise ValueError(
                f"optim.schedule.hold is time at the minimum after a decay to it, which kind {self.kind} "
                "does not have; remove it, or name kind cosine, linear or one_cycle"
            )
        if (self.decay is not None) != (self.kind == "wsd"):
            raise ValueError(
                "optim.schedule.decay and optim.schedule.kind: wsd belong together (the other shapes decay "
                "until the hold or the end); set both or neither, e.g. decay: {fraction: 0.2}"
            )
        return self

    def build(self, peak: float, batch: BatchArithmetic) -> "Schedule":
        """Build the schedule for this peak and batch. Raises ConfigError where the spans do not fit the run's steps."""
        spans = {
            name: span.resolve(batch) if span is not None else 0
            for name, span in (("warmup", self.warmup), ("hold", self.hold), ("decay", self.decay))
        }
        if sum(spans.values()) > batch.iterations:
            parts = " + ".join(f"{name} {steps}" for name, steps in spans.items() if steps)
            raise ConfigError(
                f"optim.schedule: {parts} steps do not fit the {batch.iterations} steps of the run; "
                "shorten them or raise training.budget_positions"
            )
        return Schedule(self.kind, peak, batch.iterations, self.start, self.minimum, **spans)


@dataclass(frozen=True)
class Schedule:
    """Gives the rate of the 0-based `step` as ``schedule(step)``; the last step before a hold has the minimum.

    The warmup follows ``peak * max(start, (step + 1) / warmup)``, so its last step has the peak. After the last
    step of the run the rate stays.
    """

    kind: str
    peak: float
    iterations: int
    start: float
    minimum: float
    warmup: int
    hold: int
    decay: int

    def __call__(self, step: int) -> float:
        """Give the learning rate of the 0-based `step`."""
        step = min(step, self.iterations - 1)
        if step < self.warmup:
            return self.peak * self._rise(step)
        shape, begin = _SHAPES[self.kind], self.warmup
        if self.kind == "wsd":
            begin = self.iterations - self.decay
        end = self.iterations - self.hold
        progress = (step + 1 - begin) / max(end - begin, 1)
        return self.peak * (self.minimum + (1 - self.minimum) * shape(min(max(progress, 0.0), 1.0)))

    def _rise(self, step: int) -> float:
        if self.kind == "one_cycle":
            done = step / (self.warmup - 1) if self.warmup > 1 else 1.0
            return self.start + (1 - self.start) * (1 - math.cos(math.pi * done)) / 2
        return max(self.start, (step + 1) / self.warmup)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _line(progress: float) -> float:
    return 1 - progress


def _flat(progress: float) -> float:
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _line,
    "one_cycle": _cosine,
    "wsd": _line,
    "constant": _flat,
}
