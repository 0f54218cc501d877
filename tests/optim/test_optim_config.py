import io

import pytest

from mmoe.commands.console import Console
from mmoe.config.load import load
from mmoe.errors import ConfigError
from mmoe.optim.batch import BatchArithmetic
from mmoe.optim.config import OptimConfig

BATCH = BatchArithmetic(4096, 4, 16, 16, 10**12)


def test_yaml_to_schedule_and_its_description(tmp_path) -> None:
    path = tmp_path / "optim.yaml"
    path.write_text(
        "lr: {peak: 6e-4, reference_batch_positions: 262144, scaling_rule: sqrt}\n"
        "schedule: {warmup: {positions: 3000000000}}\n"
        "optimizer: {kind: adamw, betas: [0.9, 0.95]}\n"
    )
    config = load(OptimConfig, path)
    schedule = config.build_schedule(BATCH)
    assert schedule(714) == pytest.approx(2.4e-3) and schedule(238_417) == pytest.approx(2.4e-4)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(config.describe(BATCH))
    text = console.export_text()
    for part in ("0.0024", "0.0006 x (4,194,304 / 262,144) ** 0.5, sqrt", "715", "0.30% of the run", "0.00024"):
        assert part in text


def test_a_rule_without_its_reference_is_one_sentence_with_the_keys(tmp_path) -> None:
    path = tmp_path / "optim.yaml"
    path.write_text("lr: {peak: 6e-4, scaling_rule: sqrt}\n")
    with pytest.raises(ConfigError, match="set optim.lr.reference_batch_positions too, or neither"):
        load(OptimConfig, path)
