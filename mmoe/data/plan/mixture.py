"""Share the positions of a run among its sources, stage by stage, and say how often each source would be seen.

A *stage* is a range of positions of the run. In it source i gets ``P(i) = n_i**(1/T) / sum_j n_j**(1/T)`` of the
positions (recipes.md, 5), n_i its size in positions; T may move linearly from the stage's start to its end. A source
that would be seen more often than its `max_epochs` gets what that leaves, and the others share the rest. All of it
follows from sizes that the manifests state, so `mmoe stages` prints it before anything runs.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.errors import ConfigError

REPEATS = 4.0  # epochs up to which repeated text is worth nearly as much as new (Muennighoff et al. 2023)
_STEPS = 256  # of the midpoint rule over a stage whose temperature moves
_GRID = 2.0**-30  # shares are multiples of this: exp and log differ in the last bits from machine to machine


class StageConfig(Config):
    """Configures one stage of `data.stages`; it begins where the one before it ends."""

    until: int | None = Field(default=None, gt=0)  # positions since the start of the run; null: the end of the run
    temperature: float | tuple[float, float] | None = None  # T, or T at the stage's start and at its end
    sources: tuple[str, ...] = ()  # that it draws from; empty: all
    weights: dict[str, float] | None = None  # given shares, in place of temperature and sources

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        if (self.temperature is None) == (self.weights is None):
            raise ValueError("a stage has either a temperature or weights; give one of the two")
        if self.temperature is not None and min(np.atleast_1d(self.temperature)) <= 0:
            raise ValueError(f"temperature {self.temperature} must be above 0 (1: by size, larger: flatter)")
        if self.weights is not None:
            if self.sources:
                raise ValueError("weights name the sources of a stage themselves; drop `sources`")
            if min(self.weights.values(), default=0) < 0 or sum(self.weights.values()) <= 0:
                raise ValueError(f"weights {self.weights} must be >= 0 with a positive sum")
        return self

    @property
    def drawn(self) -> tuple[str, ...]:
        """The sources that the stage names; empty means all."""
        return self.sources if self.weights is None else tuple(self.weights)


def check_mixture_stages(stages: dict[str, StageConfig], sources: Sequence[str]) -> None:
    """Raise ValueError for stages that do not follow each other or name a source that is not there."""
    for name, stage in stages.items():
        for unknown in set(stage.drawn) - set(sources):
            raise ValueError(f"stage {name} names source {unknown!r}, which is not in data.sources")
    for (name, stage), (after, next_stage) in pairwise(stages.items()):
        if stage.until is None:
            raise ValueError(f"stage {name} has no `until`, but {after} follows it; only the last may run to the end")
        if next_stage.until is not None and next_stage.until <= stage.until:
            raise ValueError(f"stage {after} ends at {next_stage.until}, not after {name} ({stage.until}); raise it")


@dataclass(frozen=True)
class SourceSize:
    """Says how large a source is: its positions in one epoch, and how many epochs the run may see at most."""

    name: str
    positions: int
    max_epochs: float | None = None


@dataclass(frozen=True)
class Expectation:
    """Says how much one stage takes from one source: positions, their share of the stage, and epochs of it."""

    positions: float
    share: float
    epochs: float


class Stage:
    """Shares one stage among all sources of the run: ``shares(position)`` are fractions that sum to 1."""

    def __init__(
        self, name: str, config: StageConfig, start: int, stop: int, sources: Sequence[SourceSize], used: np.ndarray
    ) -> None:
        """Make the stage of the positions `start`..`stop` of the run over `sources`.

        `used` [sources]: expected positions of the earlier stages, which count towards `max_epochs`.
        """
        self.name, self.config, self.start, self.stop = name, config, start, stop
        self._names = [source.name for source in sources]
        self._logs = np.log([max(source.positions, 1) for source in sources])
        self._drawn = np.array([not config.drawn or source.name in config.drawn for source in sources])
        caps = [np.inf if s.max_epochs is None else s.max_epochs * s.positions for s in sources]
        self._ceiling = np.where(self._drawn, np.maximum(np.array(caps) - used, 0) / (stop - start), 0.0)
        if self._ceiling.sum() < 1:
            raise ConfigError(
                f"stage {name} needs {stop - start:,} positions, but with their max_epochs its sources "
                f"({', '.join(np.array(self._names)[self._drawn])}) have {self._ceiling.sum() * (stop - start):,.0f} "
                "left; raise data.sources.*.max_epochs, add sources, or shorten the stage"
            )

    def shares(self, position: int) -> np.ndarray:
        """Return the fractions of the sources, [sources], at this position of the run, below every ceiling."""
        return _below(self.wanted(position), self._ceiling)

    def wanted(self, position: int) -> np.ndarray:
        """Return the fractions of the sources, [sources], before `max_epochs` is looked at."""
        if self.config.weights is not None:
            weights = np.array([self.config.weights.get(name, 0.0) for name in self._names])
            return weights / weights.sum()
        temperature = self.config.temperature
        assert temperature is not None  # without weights a stage has one
        first, last = temperature if isinstance(temperature, tuple) else (temperature, temperature)
        progress = min(max((position - self.start) / (self.stop - self.start), 0.0), 1.0)
        exponents = np.where(self._drawn, self._logs / (first + (last - first) * progress), -np.inf)
        weights = np.exp(exponents - exponents.max())
        return weights / weights.sum()

    def mean(self, shares: str) -> np.ndarray:
        """Average `shares` ("shares" or "wanted") over the stage: [sources]."""
        if not isinstance(self.config.temperature, tuple):
            return getattr(self, shares)(self.start)
        at = self.start + (np.arange(_STEPS) + 0.5) / _STEPS * (self.stop - self.start)
        return np.mean([getattr(self, shares)(position) for position in at], axis=0)


class Mixture:
    """Holds the stages of a run over its sources, in the order of `sources`.

    Raises ConfigError where the sources' `max_epochs` leave too little for a stage.
    """

    def __init__(self, stages: dict[str, StageConfig], sources: Sequence[SourceSize], end: int) -> None:
        """Make the stages of a run over `sources`.

        `end`: positions of the whole run, where a last stage without `until` ends.
        """
        self.sources, self.stages = tuple(sources), list[Stage]()
        start, used = 0, np.zeros(len(self.sources))
        for name, config in stages.items():
            stop = max(end, start + 1) if config.until is None else config.until
            stage = Stage(name, config, start, stop, self.sources, used)
            self.stages.append(stage)
            used = used + stage.mean("shares") * (stop - start)
            start = stop

    @cached_property
    def _borders(self) -> list[int]:
        return [stage.stop for stage in self.stages[:-1]]

    def stage(self, position: int) -> Stage:
        """Return the stage that this position of the run lies in; the last one goes on for ever."""
        return self.stages[bisect_right(self._borders, position)]

    def shares(self, position: int) -> np.ndarray:
        """Return the fractions of the positions, [sources]: multiples of 2**-30, equal on every machine."""
        return np.rint(self.stage(position).shares(position) / _GRID) * _GRID

    def expected(self, stage: Stage) -> list[Expectation]:
        """Return how much the stage is expected to take, by source."""
        length = stage.stop - stage.start
        return [
            Expectation(share * length, share, share * length / max(source.positions, 1))
            for share, source in zip(stage.mean("shares").tolist(), self.sources, strict=True)
        ]

    def warnings(self) -> list[str]:
        """Return a sentence for each source that a stage would see too often to be useful, or that a cap holds back."""
        sentences = []
        for stage in self.stages:
            wanted = stage.mean("wanted")
            for source, share, plan in zip(self.sources, wanted.tolist(), self.expected(stage), strict=True):
                epochs = share * (stage.stop - stage.start) / max(source.positions, 1)
                seen = f"source {source.name} would be seen {epochs:.1f} times in stage {stage.name}"
                if plan.share < share * (1 - 1e-9):
                    lowered = f"lowers its share from {share:.2%} to {plan.share:.2%}"
                    sentences.append(f"{seen}; its max_epochs {source.max_epochs:g} {lowered}")
                elif plan.epochs > (source.max_epochs or REPEATS):
                    sentences.append(f"{seen}; lower its share, add data, or set data.sources.{source.name}.max_epochs")
        return sentences


def _below(shares: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """Shares with sum 1 held below `ceiling` [n]; what that frees goes to the others in proportion to their shares."""
    held = np.zeros(len(shares), bool)
    result = shares
    while (result > ceiling * (1 + 1e-12)).any():
        held |= result > ceiling
        free = 1.0 - ceiling[held].sum()
        rest = shares[~held].sum()
        if rest <= 0:  # all that has a share is at its ceiling: who has room left takes it by room
            room = np.where(held, 0.0, ceiling)
            return np.where(held, ceiling, room / room.sum() * free)
        result = np.where(held, ceiling, shares / rest * free)
    return result
