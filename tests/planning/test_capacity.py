"""What the capacity advisor makes of a run's records."""

import json
from fractions import Fraction
from math import ceil

import numpy as np
import pytest

from mmoe.config.load import dump, load
from mmoe.errors import ConfigError, DataError
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.statistics import CAPACITY_FACTORS
from mmoe.planning.capacity import LIMIT, advise, read_advice
from mmoe.precision.config import PrecisionConfig
from mmoe.recipe.config import RunConfig
from mmoe.reporting.figures import would_drop
from tests.conftest import REPOSITORY

G = len(CAPACITY_FACTORS)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load(RunConfig, REPOSITORY / "configs" / "demo.yaml")


@pytest.fixture(scope="module")
def shape(config) -> tuple[ModelConfig, int, PrecisionConfig]:
    """What the advice reads of a config."""
    return config.model, config.data.sequence_length, config.precision


def record(step: int, first: list[int], second: list[int], choices: int = 40_000) -> dict:
    """`first` and `second` would be dropped in the two layers, each of `choices` on 8 experts."""
    load = [choices // 8] * 8
    return {
        "step": step,
        "expert_load": {"0": load, "1": load},
        "capacity_factors": list(CAPACITY_FACTORS),
        "would_drop": {"0": first, "1": second},
    }


def falling(zero_from: int, start: int = 4000) -> list[int]:
    """So many dropped at the first factor, none from factor number `zero_from` on."""
    return [start * max(zero_from - c, 0) // zero_from for c in range(G)]


def test_rates_are_sums_over_the_last_part_of_the_run(shape):
    early = [record(step, [40_000] * G, [40_000] * G) for step in (10, 20, 50)]
    late = [record(60, falling(4), falling(10)), record(100, falling(8), falling(10), choices=80_000)]
    advice = advise(early + late, *shape, 0.5, "run")
    assert (advice.first, advice.last) == (60, 100)
    assert advice.choices.tolist() == [120_000, 120_000]
    np.testing.assert_array_equal(advice.drops[0], np.array(falling(4)) + falling(8))
    np.testing.assert_allclose(advice.rates[1], np.array(falling(10)) * 2 / 120_000)
    np.testing.assert_allclose(advice.rates_overall, advice.rates.mean(0))
    assert advise(early + late, *shape, 1.0, "run").first == 10
    assert advise(early + late, *shape, 0.01, "run").first == 100


def test_the_smallest_factor_drops_less_than_the_limit_and_the_one_below_does_not(shape):
    at_limit = [400] * 3 + [40] * 2 + [39] * (G - 5)  # of 40,000: exactly 0.1 % is too much
    advice = advise([record(10, at_limit, falling(3))], *shape, 1.0, "run")
    assert advice.smallest == [CAPACITY_FACTORS[5], CAPACITY_FACTORS[3]]
    assert advice.smallest_everywhere == CAPACITY_FACTORS[5]
    assert advice.smallest_overall == CAPACITY_FACTORS[3]  # 40 of 80,000
    assert advice.rates[0, 4] >= LIMIT > advice.rates[0, 5]
    hopeless = advise([record(10, [400] * G, falling(3))], *shape, 1.0, "run")
    assert hopeless.smallest == [None, CAPACITY_FACTORS[3]]
    assert hopeless.smallest_everywhere is None and hopeless.smallest_overall is None


def test_rows_and_bytes_follow_the_printed_formula(shape):
    """1056 positions, top 2 of 8, width 160, hidden 224, bfloat16."""
    advice = advise([record(10, falling(3), falling(3))], *shape, 1.0, "run")
    rows = [ceil(Fraction(n, 20) * 1056 * 2 / 8) for n in range(20, 41)]
    assert advice.rows.tolist() == rows and rows[0] == 264
    assert advice.bytes.tolist() == [8 * r * (2 * 160 + 4 * 224) * 2 for r in rows]


def test_the_figure_has_a_line_for_each_layer_and_one_for_all(shape):
    advice = advise([record(10, falling(3), falling(9))], *shape, 1.0, "run")
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
    lines = [{"step": 10, "expert_load": {"0": [1]}}, record(20, falling(3), falling(3))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_advice(run, 0.5).first == 20
    with pytest.raises(DataError, match="step 10 has no would_drop.*--last"):
        read_advice(run, 1.0)
    other = record(20, falling(3), falling(3)) | {"capacity_factors": [1.0, 1.5]}
    with pytest.raises(DataError, match="step 20 has other capacity_factors"):
        advise([other], *shape, 1.0, "run")
    dense = config.model_copy(update={"model": config.model.model_copy(update={"moe": None})})
    (run / "config.yaml").write_text(dump(dense))
    with pytest.raises(ConfigError, match="model.moe is null, so there are no experts"):
        read_advice(run)
