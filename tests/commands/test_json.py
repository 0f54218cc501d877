"""What a program reads: JSON alone on stdout, with the figures that the tables have."""

import json
import logging
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from mmoe.commands.console import print_json
from mmoe.commands.main import app
from mmoe.config.load import dump, load
from mmoe.planning import data
from mmoe.planning.data import inspect, mixture_of
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY
from tests.planning.dry_run_small import SMALL, plan
from tests.training.test_trainer import config, write_sources

LARGE = REPOSITORY / "configs/moe_10b.yaml"


def printed(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


def test_stages_are_those_of_the_mixture():
    found, recipe = printed("stages", str(LARGE)), load(RunConfig, LARGE)
    mixture = mixture_of(recipe.data, recipe.tokenizers, recipe.training.budget_positions)
    assert found["steps"] == recipe.batch.iterations == 2_384_185
    assert [stage["name"] for stage in found["stages"]] == ["cold", "mid", "hot"]
    for stage, told in zip(mixture.stages, found["stages"], strict=True):
        assert (told["start"], told["stop"]) == (stage.start, stage.stop)
        shares = [source["share"] for source in told["sources"]]
        assert shares == [each.share for each in mixture.expected(stage)] and np.isclose(sum(shares), 1)
    assert found["warnings"] == mixture.warnings()


def test_an_inspection_is_that_of_the_plan(tmp_path):
    write_sources(tmp_path)
    recipe = config(tmp_path, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump(recipe))
    found, planned = printed("inspect", str(tmp_path / "run.yaml"), "--steps", "2"), inspect(recipe, 2, 1)
    assert found["packing_efficiency"] == planned.packing_efficiency and found["sequences"] == planned.sequences
    assert [each["positions"] for each in found["sources"]] == [each.positions for each in planned.sources]
    assert found["balance"] == {"attention": 1.0, "vision": 1.0} and found["lost"] == planned.lost


def test_an_estimate_is_that_of_the_dry_run_and_of_the_formulas():
    arguments = ["--world-size", "2", "--rank", "1", "--documents", "4", "--vocabulary", "500", "model.moe=null"]
    found, dry = printed("estimate", str(LARGE), *SMALL, *arguments), plan(2, "model.moe=null")
    (told,) = found["ranks"]
    assert told["memory_formula"] == asdict(dry.memory(1)) and told["flops_formula"] == dry.flops(1)
    assert told["memory"]["weights"] == dry.memory(1).weights and told["traffic_is_formula"]
    assert sum(each["bytes"] for each in told["traffic"]) == sum(dry.traffic(1).bytes.values()) > 0
    assert found["parallel"]["dp_shard"] == 2 and found["world_size"] == 2 and told["rank"] == 1


@pytest.mark.parametrize("asked", [True, False])
def test_messages_go_to_stderr_and_stdout_is_one_value(monkeypatch, asked):
    real = data.mixture_of

    def mixture(*arguments):
        logging.getLogger("mmoe.planning").info("said")
        return real(*arguments)

    monkeypatch.setattr(data, "mixture_of", mixture)
    done = CliRunner().invoke(app, ["stages", str(LARGE), *(["--json"] if asked else [])])
    assert ("said" in done.stderr, "said" in done.stdout) == (asked, not asked)
    assert not asked or json.loads(done.stdout)["steps"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_has_no_number_for_is_null(capsys, value):
    print_json({1: [value, 1.5, {"x": value}]})
    assert json.loads(capsys.readouterr().out) == {"1": [None, 1.5, {"x": None}]}
