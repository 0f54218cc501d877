"""A dry run needs neither data nor devices, and says what is wrong with a question."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.errors import ConfigError
from mmoe.planning.dry_run_fake import DryMode
from mmoe.planning.dry_run_routing import Load
from tests.planning.dry_run_small import SMALL, plan


def test_integers_are_computed_and_floats_are_not() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), DryMode():
        numbers = torch.arange(6)
        assert numbers[numbers > 3].tolist() == [4, 5]
        assert isinstance(numbers.float(), FakeTensor)
        assert isinstance(torch.zeros(3).argsort(), FakeTensor)
        buffer = torch.empty(2, dtype=torch.long)
        buffer[1] = 7
        assert buffer[1].item() == 7
        assert isinstance(torch.ones(2000, 2000, dtype=torch.bool), FakeTensor)


def test_a_load_fills_the_busiest_rank() -> None:
    assert Load(1.5).sent(800, 4, 1, None) == [167, 300, 167, 167]
    assert Load(1.5).sent(800, 4, 1, 1.25) == [167, 250, 167, 167]
    assert Load().sent(800, 1, 0, None) == [800]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overrides": "parallel.ep=2", "imbalance": 3.0}, "between 1 and 2"),
        ({"imbalance": 0.5}, "--imbalance is 0.5"),
        ({"documents": 3}, "--documents is 3"),
        ({"overrides": "parallel.dp_shard=3"}, "= 3, but there are 4 processes"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(4, **options)


def test_a_rank_beyond_the_world_is_refused() -> None:
    command = ["estimate", "configs/moe_10b.yaml", "--world-size", "4", "--rank", "4", *SMALL]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError) and "--rank is 4" in str(result.exception)


def test_a_pipeline_embeds_groups_wider_than_a_micro_step_first() -> None:
    """Of all stages: each is one more time forward."""
    step = plan(4, "parallel.pp=2 losses.contrastive.group_sequences=16")
    for rank in (0, 2):
        assert step.cost(rank).traffic == step.traffic(rank)


def test_the_command_reports_a_rank_of_each_stage() -> None:
    command = ["estimate", "configs/moe_10b.yaml", "--world-size", "8", "parallel.pp=4"]
    result = CliRunner().invoke(app, [*command, *SMALL, "model.n_layers=4"])
    assert result.exit_code == 0, result.output
    assert [f"rank {rank}, stage {rank // 2}" in result.output for rank in (0, 4, 6)] == [True] * 3
    assert result.output.count("equal to the formula") == 3


@pytest.mark.slow
@pytest.mark.parametrize("overrides, stages", [("parallel.ep=8", 1), ("parallel.ep=16", 1), ("parallel.pp=4", 3)])
def test_the_main_run_on_256_ranks(overrides: str, stages: int) -> None:
    """What it costs is measured by `benchmarks/dry_run.py`."""
    command = [sys.executable, "-m", "mmoe", "estimate", "configs/moe_10b.yaml", "--world-size", "256"]
    done = subprocess.run([*command, "--imbalance", "1.3", overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to the formula") == stages
