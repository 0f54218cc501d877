"""Advises on the capacity factor: what each would have dropped of the slots that a run made, and its memory.

Shape suffixes: N layers of experts, C capacity factors.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmoe.errors import ConfigError, DataError
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.statistics import CAPACITY_FACTORS, capacities
from mmoe.monitoring.reader import RunReader
from mmoe.monitoring.tables import FOLDER
from mmoe.precision.config import PrecisionConfig
from mmoe.training.run import UNWATCHED, read_config

LIMIT = 1e-3  # of the slots may be dropped
LAST = 0.5  # of the steps are looked at, unless told otherwise: routing settles first
BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float64": 8}

FORMULA = (
    "rows of an expert for a sequence: C = ceil(cf * L * K / E); bytes of a sequence's rows in a layer: "
    "E * C * (2 D + 4 F) * bytes of a number, for the tokens brought and the outputs (D each), and for gate, "
    "silu(gate), up and their product (F each); cf 1 has the rows of a dropless layer without padding"
)


@dataclass(frozen=True)
class CapacityAdvice:
    """Holds figures for C capacity factors and N layers of experts (numbered from 0 among them).

    `drops` [N, C] i64 are the slots that each factor would have dropped, `slots` [N] i64 all of them, between the
    records of steps `first` and `last`. `rows` [C] are those of one expert for one sequence, `bytes` [C]
    the activations of one sequence in the experts of one layer.
    """

    factors: tuple[float, ...]
    drops: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    bytes: np.ndarray
    first: int
    last: int

    @property
    def rates(self) -> np.ndarray:
        """The share of the slots of each layer that each factor would have dropped, [N, C]."""
        return self.drops / np.maximum(self.slots, 1)[:, None]

    @property
    def rates_overall(self) -> np.ndarray:
        """The share of the slots of all layers that each factor would have dropped, [C]."""
        return self.drops.sum(0) / max(self.slots.sum(), 1)

    @property
    def smallest(self) -> list[float | None]:
        """The smallest factor of each layer that drops less than `LIMIT`; None where not even the largest does."""
        return [self._smallest(rates) for rates in self.rates]

    @property
    def smallest_overall(self) -> float | None:
        """The smallest factor with which all layers together drop less than `LIMIT`; None where there is none."""
        return self._smallest(self.rates_overall)

    @property
    def smallest_everywhere(self) -> float | None:
        """The smallest factor with which every layer drops less than `LIMIT`; None where there is none."""
        return self._smallest(self.rates.max(0))

    def _smallest(self, rates: np.ndarray) -> float | None:
        return next((factor for factor, rate in zip(self.factors, rates) if rate < LIMIT), None)


def read_advice(folder: str | Path, share: float = LAST) -> CapacityAdvice:
    """Read the capacity advice of the run in `folder` from the last `share` (0 to 1) of its steps.

    Raises ConfigError where it is no run or has no experts, DataError where nothing was trained or counted.
    """
    folder = Path(folder)
    config = read_config(folder, UNWATCHED)
    return advise(RunReader(folder), config.model, config.data.sequence_length, config.precision, share)


def advise(
    reader: RunReader, model: ModelConfig, sequence_length: int, precision: PrecisionConfig, share: float
) -> CapacityAdvice:
    """Derive capacity advice from the records of the last `share` (0 to 1) of a run's steps.

    Raises ConfigError for a model without experts, DataError where no record counts what would be dropped.
    """
    moe, folder = model.moe, reader.folder
    if moe is None:
        raise ConfigError(f"{folder}: model.moe is null, so there are no experts whose capacity could be chosen")
    last = reader.last()["step"]
    begin = int(last - last * share)
    for factors in reader.tables("capacity_factors", begin):
        if any(tuple(found) != CAPACITY_FACTORS for found in factors.values):
            raise DataError(
                f"{folder}/{FOLDER}: the records of steps {factors.steps[0]} to {factors.steps[-1]} have other "
                "capacity_factors than this version counts; choose a later part of the run with --last"
            )
    steps, drops, slots = np.zeros(0, np.int64), np.int64(0), np.int64(0)
    for would_drop, chosen in zip(reader.tables("would_drop", begin), reader.tables("expert_load", begin)):
        steps = np.concatenate([steps, would_drop.steps])
        drops = drops + would_drop.values.sum(0)
        slots = slots + chosen.values.sum((0, 2, 3, 4))
    if not len(steps):
        raise DataError(
            f"{folder}/{FOLDER} has no would_drop after step {begin} of {last}; choose a larger part of the run with "
            "--last, or train it again with the sinks jsonl and arrays"
        )
    width = 2 * model.d_model + 4 * moe.intermediate_size
    rows = capacities(sequence_length, moe.top_k, moe.n_experts).numpy()
    return CapacityAdvice(
        factors=CAPACITY_FACTORS,
        drops=np.asarray(drops),
        slots=np.asarray(slots),
        rows=rows,
        bytes=rows * moe.n_experts * width * BYTES_OF_DTYPE[precision.compute],
        first=int(steps[0]),
        last=int(steps[-1]),
    )
