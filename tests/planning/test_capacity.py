"""What the capacity advisor makes of a run's records."""

from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from mmoe.config.load import dump, load
from mmoe.errors import ConfigError, DataError
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.statistics import CAPACITY_FACTORS
from mmoe.monitoring.reader import RunReader
from mmoe.monitoring.record import StepRecord
from mmoe.planning.capacity import LIMIT, advise, read_advice
from mmoe.precision.config import PrecisionConfig
from mmoe.recipe.config import RunConfig
from mmoe.reporting.figures import would_drop
from tests.conftest import REPOSITORY
from tests.monitoring.written import write_records

G = len(CAPACITY_FACTORS)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load(RunConfig, REPOSITORY / "configs" / "demo.yaml")


@pytest.fixture(scope="module")
def shape(config) -> tuple[ModelConfig, int, PrecisionConfig]:
    """What the advice reads of a config."""
    return config.model, config.data.sequence_length, config.precision


def record(step: int, first: list[int], second: list[int], choices: int = 40_000) -> StepRecord:
    """`first` and `second` would be dropped in the two layers, each of `choices` on 8 experts."""
    tables = {
        "expert_load": np.full((2, 1, 1, 8), choices // 8),
        "capacity_factors": np.array(CAPACITY_FACTORS),
        "would_drop": np.array([first, second]),
    }
    return StepRecord(step, 0, {"loss": 1.0}, tables)


def write(folder: Path, *records: StepRecord) -> RunReader:
    write_records(folder, *records)
    return RunReader(folder)


def falling(zero_from: int, start: int = 4000) -> list[int]:
    """So many dropped at the first factor, none from factor number `zero_from` on."""
    return [start * max(zero_from - c, 0) // zero_from for c in range(G)]


def test_rates_are_sums_over_the_last_part_of_the_run(shape, tmp_path):
    early = [record(step, [40_000] * G, [40_000] * G) for step in (10, 20, 50)]
    late = [record(60, falling(4), falling(10)), record(100, falling(8), falling(10), choices=80_000)]
    reader = write(tmp_path, *early, *late)
    advice = advise(reader, *shape, 0.5)
    assert (advice.first, advice.last) == (60, 100)
    assert advice.slots.tolist() == [120_000, 120_000]
    np.testing.assert_array_equal(advice.drops[0], np.array(falling(4)) + falling(8))
    np.testing.assert_allclose(advice.rates[1], np.array(falling(10)) * 2 / 120_000)
    np.testing.assert_allclose(advice.rates_overall, advice.rates.mean(0))
    assert advise(reader, *shape, 1.0).first == 10
    assert advise(reader, *shape, 0.01).first == 100


def test_the_smallest_factor_drops_less_than_the_limit_and_the_one_below_does_not(shape, tmp_path):
    at_limit = [400] * 3 + [40] * 2 + [39] * (G - 5)  # of 40,000: exactly 0.1 % is too much
    advice = advise(write(tmp_path, record(10, at_limit, falling(3))), *shape, 1.0)
    assert advice.smallest == [CAPACITY_FACTORS[5], CAPACITY_FACTORS[3]]
    assert advice.smallest_everywhere == CAPACITY_FACTORS[5]
    assert advice.smallest_overall == CAPACITY_FACTORS[3]  # 40 of 80,000
    assert advice.rates[0, 4] >= LIMIT > advice.rates[0, 5]
    hopeless = advise(write(tmp_path, record(10, [400] * G, falling(3))), *shape, 1.0)
    assert hopeless.smallest == [None, CAPACITY_FACTORS[3]]
    assert hopeless.smallest_everywhere is None and hopeless.smallest_overall is None


def test_rows_and_bytes_follow_the_printed_formula(shape, tmp_path):
    """1056 positions, top 2 of 8, width 160, hidden 224, bfloat16."""
    advice = advise(write(tmp_path, record(10, falling(3), falling(3))), *shape, 1.0)
    rows = [ceil(Fraction(n, 20) * 1056 * 2 / 8) for n in range(20, 41)]
    assert advice.rows.tolist() == rows and rows[0] == 264
    assert advice.bytes.tolist() == [8 * r * (2 * 160 + 4 * 224) * 2 for r in rows]


def test_the_figure_has_a_line_for_each_layer_and_one_for_all(shape, tmp_path):
    advice = advise(write(tmp_path, record(10, falling(3), falling(9))), *shape, 1.0)
    lines = {line.name: line.y for line in would_drop(advice).data}
    assert list(lines) == ["expert layer 0", "expert layer 1", "all layers"]
    np.testing.assert_allclose(lines["expert layer 1"], np.array(falling(9)) / 40_000)


def test_runs_that_cannot_be_advised_are_refused_with_the_remedy(config, shape, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="run/config.yaml does not exist.*train it first"):
        read_advice(run)
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    with pytest.raises(DataError, match="metrics.jsonl does not exist.*train it first"):
        read_advice(run)
    write(run, record(20, falling(3), falling(3)), StepRecord(100, 0, {"loss": 1.0}))
    assert read_advice(run, 1.0).first == 20
    with pytest.raises(DataError, match="has no would_drop after step 50 of 100.*--last.*sinks jsonl and arrays"):
        read_advice(run, 0.5)
    other = record(20, falling(3), falling(3))
    other.tables["capacity_factors"] = np.array([1.0, 1.5])
    with pytest.raises(DataError, match="steps 20 to 20 have other capacity_factors"):
        advise(write(run, other), *shape, 1.0)
    dense = config.model_copy(update={"model": config.model.model_copy(update={"moe": None})})
    (run / "config.yaml").write_text(dump(dense))
    with pytest.raises(ConfigError, match="model.moe is null, so there are no experts"):
        read_advice(run)
