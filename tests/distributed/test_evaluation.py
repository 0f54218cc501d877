"""Evaluation on the model as it is spread: the figures of one process, and a training that is blind to it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

from mmoe.checkpoint.rng import capture_rng
from mmoe.config.load import dump, validate
from mmoe.errors import ConfigError
from mmoe.evaluation.callback import Evaluation, measure_run
from mmoe.evaluation.evaluate import evaluate
from mmoe.models.decoder import MultimodalModel
from mmoe.monitoring.metrics import state_digest
from mmoe.recipe.config import RunConfig
from mmoe.recipe.evaluation import EvaluationConfig
from mmoe.training.callback import Callback
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.conftest import REPOSITORY
from tests.data.synthetic import BUTTONS, MAKERS, button_sample, fit_codec, write_source
from tests.training.test_trainer import config

EXACT = {
    "precision": {"compute": "float64"},
    "model__moe__expert_backend": "loop",
    "model__moe__capacity_factor": 1.0,  # tokens are dropped, so that packing must be that of one process
    "optim__matrices": None,
    "losses__contrastive": {"weight": 0.3},
    "training__global_batch_positions": 1280,
    "training__budget_positions": 1280 * 6,
    "checkpoint__every_steps": 100,
}
LAYOUTS = {"dp2": {}, "ep2": {"ep": 2}, "tp2": {"tp": 2}, "cp2": {"cp": 2}, "pp2": {"pp": 2}}
FOUR = {"pp2,ep2": {"pp": 2, "ep": 2}, "tp2,ep2": {"tp": 2, "ep": 2}, "cp2,ep4": {"cp": 2, "ep": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources of every kind; of the text only one document is held out, so that a replica has no batch of it."""
    root = tmp_path_factory.mktemp("evaluation")
    for number, (name, make) in enumerate((MAKERS | {"clip": button_sample}).items()):
        rng, heldout = np.random.default_rng(number), 1 if name == "text" else 7
        samples = {
            s: [make(rng, f"{name}-{s[0]}{i}") for i in range(n)] for s, n in (("train", 16), ("heldout", heldout))
        }
        write_source(root / name, samples, categories=BUTTONS if name == "clip" else None)
    fit_codec(root / "codec.safetensors")
    return root


def tree(folder: Path, run: Path, changes: dict | None = None, **parallel) -> RunConfig:
    configuration = config(folder, run, **EXACT | (changes or {})).model_dump(mode="json")
    return validate(RunConfig, configuration | {"parallel": configuration["parallel"] | parallel}, "test")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a run whose heads have learned something, and what one process measures of it."""
    runs = {}
    for name, changes in {
        "continuous": {},
        "discrete": {"tokenizers__action": {"mode": "discrete", "chunk": 4}},
    }.items():
        run = Run.build(tree(folder, tmp_path_factory.mktemp("runs") / name, changes))
        run.save_config()
        Trainer(run, []).train()
        runs[name] = run.folder, evaluate(Run.load(run.folder))
    return runs


def measured(place: Path, overrides: list[str]) -> dict | None:
    return evaluate(Run.load(place, overrides=overrides))


def overrides(layout: dict) -> list[str]:
    return [f"parallel.{axis}={degree}" for axis, degree in layout.items()]


def unlike(name: str, got, expected) -> list[str]:
    """A sentence for each leaf that is not the same; numbers may differ by rounding."""
    if isinstance(expected, dict):
        if got.keys() != expected.keys():
            return [f"{name} has {sorted(got)} instead of {sorted(expected)}"]
        return [
            text for key in expected if key != "seconds" for text in unlike(f"{name}.{key}", got[key], expected[key])
        ]
    if isinstance(expected, list) and len(got) == len(expected):
        return [text for i, pair in enumerate(zip(got, expected)) for text in unlike(f"{name}[{i}]", *pair)]
    same = got == pytest.approx(expected, rel=1e-6, abs=1e-9) if isinstance(expected, float) else got == expected
    return [] if same else [f"{name} is {got} instead of {expected}"]


def check(pool, place: Path, expected: dict, layout: dict) -> None:
    results = pool.run(measured, place, overrides(layout))
    assert results[1:] == [None] * (pool.world - 1)
    assert not unlike("evaluation", results[0], expected)
    assert json.loads((place / "evaluation.json").read_text()) == json.loads(json.dumps(results[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("actions", ["continuous", "discrete"])
def test_two_ranks_measure_what_one_process_does(two, trained, layout, actions):
    place, expected = trained[actions]
    assert expected["action_mse"] > 0 and expected["ranking"]["audio"]["rows"] == 7
    assert 0 < expected["categories"]["clip"]["gas"]["accuracy"] < 1
    assert expected["samples"]["text"] == {"held_out": 1, "evaluated": 1}
    check(two, place, expected, LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_measure_what_one_process_does(four, trained, layout):
    """Of the two replicas or four some have no batch left, while their experts are needed by the others."""
    check(four, *trained["continuous"], FOUR[layout])


def rounds(place: Path) -> list[tuple[int, int]]:
    """The forward passes of this rank, and the batches that it counts, of each measure."""
    run, found = Run.load(place), []
    forward = run.ranks.hidden

    def counted(model, batch):
        found.append((batch.shape[0], sum(map(len, batch.documents))))
        return forward(model, batch)

    run.ranks.hidden = counted
    evaluate(run)
    return found


def test_every_replica_does_as_many_passes_of_one_size_and_no_document_is_left_out(two, trained):
    place, _ = trained["continuous"]
    first, second = two.run(rounds, place)
    assert len(first) == len(second)
    assert {sequences for sequences, _ in first} == {sequences for sequences, _ in second} == {2}
    assert any(documents == 0 for _, documents in second)  # a replica that has no batch left
    alone = rounds(place)
    assert sum(n for _, n in first) + sum(n for _, n in second) == sum(n for _, n in alone)


def held(place: Path, overrides: list[str]) -> tuple[int, int]:
    """Bytes of the parameters on this rank, loaded, and after it has measured."""
    run = Run.load(place, overrides=overrides)
    before = parameter_bytes(run.model)
    evaluate(run)
    return before, parameter_bytes(run.model)


def parameter_bytes(model: MultimodalModel) -> int:
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local)


@pytest.mark.parametrize("layout", ["dp2", "ep2", "pp2"])
def test_a_rank_holds_about_half_of_the_parameters_before_and_after(two, trained, layout):
    place, _ = trained["continuous"]
    whole = parameter_bytes(Run.load(place).model)
    for before, after in two.run(held, place, overrides(LAYOUTS[layout])):
        assert after == before < (0.9 if layout == "pp2" else 0.6) * whole  # stages are whole layers, tables on both


def layout_of(place: Path, overrides: list[str]) -> dict:
    return Run.load(place, overrides=overrides).config.parallel.model_dump()


def test_the_layout_is_the_runs_own_where_it_fits_else_data_parallel(two, folder, trained, tmp_path):
    place, _ = trained["continuous"]
    saved = (place / "config.yaml").read_text()
    try:
        for given, expected in (({"ep": 2}, {"ep": 2}), ({"tp": 2, "pp": 2, "ep": 2}, {"tp": 1, "pp": 1, "ep": 1})):
            changed = tree(folder, place, zero=1, **given)
            replace_config(place, changed)
            for found in two.run(layout_of, place, []):
                assert {axis: found[axis] for axis in expected} == expected
                assert found["zero"] == 3
            assert (
                two.run(
                    layout_of,
                    place,
                    ["parallel.zero=2", "parallel.cp=2", "parallel.ep=1", "parallel.tp=1", "parallel.pp=1"],
                )[0]["zero"]
                == 2
            )
    finally:
        (place / "config.yaml").write_text(saved)


def replace_config(place: Path, configuration: RunConfig) -> None:
    (place / "config.yaml").unlink()
    run = Run.build(configuration)
    replace(run, folder=place).save_config()


def test_one_process_refuses_degrees_that_it_cannot_have(trained):
    place, _ = trained["continuous"]
    with pytest.raises(ConfigError, match="parallel.ep=2 needs several processes.*torchrun --nproc-per-node 2"):
        Run.load(place, overrides=["parallel.ep=2"])
    with pytest.raises(ConfigError, match="model.rope_theta cannot be changed .* the layout, such as parallel.ep=2"):
        Run.load(place, overrides=["model.rope_theta=5.0"])


class Told(Callback):
    """Keeps the losses of the steps, the random states behind them and what was measured in between."""

    name = "told"

    def __init__(self) -> None:
        self.losses, self.figures = [], []

    def on_step(self, result) -> None:
        self.losses.append((float(result.losses.loss), result.grad_norm, capture_rng()))

    def on_evaluation(self, result) -> None:
        self.figures.append((result.step, {name: x for name, x in result.scalars.items() if name != "seconds"}))


def train(configuration: RunConfig, evaluates: bool) -> tuple[list, str, list]:
    run, told = Run.build(configuration), Told()
    run.folder.mkdir(exist_ok=True)
    settings = EvaluationConfig(every_steps=2, batches=3)
    trainer = Trainer(run, [*([Evaluation(settings)] if evaluates else []), told], stop_at=5)
    trainer.train()
    return told.losses, state_digest(trainer.state), trainer.state.position, told.figures


NOISY = {"model__moe__router_noise": 0.5, "model__moe__bias_update_rate": 0.01}


def check_blind(without: tuple, evaluated: tuple) -> list:
    """The numbers of training are the same in every bit; gives the figures that were told."""
    assert evaluated[:3] == without[:3]
    assert not without[3] and [step for step, _ in evaluated[3]] == [2, 4]
    return evaluated[3]


def test_training_is_blind_to_an_evaluation_in_between_on_one_process(folder, tmp_path):
    without = train(tree(folder, tmp_path / "without", NOISY), False)
    told = check_blind(without, train(tree(folder, tmp_path / "with", NOISY), True))
    assert {"ce_text", "ce_audio_from_audio", "action_mse", "action_mse_from_clip"} <= told[0][1].keys()
    assert told[0][1]["ce_audio"] != told[1][1]["ce_audio"]


@pytest.mark.parametrize("layout", ["dp2", "ep2", "pp2"])
def test_training_is_blind_to_an_evaluation_in_between_in_every_layout(two, folder, tmp_path, layout):
    alone = train(tree(folder, tmp_path / "one", NOISY), True)[3]
    without = two.run(train, tree(folder, tmp_path / "without", NOISY, **LAYOUTS[layout]), False)
    evaluated = two.run(train, tree(folder, tmp_path / "with", NOISY, **LAYOUTS[layout]), True)
    for rank in (0, 1):
        told = check_blind(without[rank], evaluated[rank])
        assert not unlike("told", json.loads(json.dumps(told)), json.loads(json.dumps(alone)))


def test_a_bounded_evaluation_takes_the_same_batches_every_time(folder, tmp_path):
    run = Run.build(tree(folder, tmp_path / "run"))
    whole, bounded, again = (run.heldout(isolated=False, most_batches=n) for n in (None, 2, 2))
    assert len(whole) > len(bounded) == 2
    assert bounded.documents == again.documents < whole.documents
    everything = measure_run(run, run.heldout(isolated=False))
    assert everything["ce_audio"] == pytest.approx(evaluate(run)["val_ce"]["audio"], rel=1e-12)
    assert everything["action_mse"] == pytest.approx(
        evaluate(run)["action_mse"], rel=1e-6
    )  # targets are f32 in a batch


def torchrun(*arguments: object) -> str:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmoe", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_training_of_two_ranks_ends_with_the_evaluation_that_mmoe_evaluate_repeats(folder, tmp_path):
    changes = {"evaluation": {"every_steps": 2, "batches": 2}, "training__budget_positions": 1280 * 3}
    configuration = tree(folder, tmp_path / "run", changes, ep=2)
    (tmp_path / "config.yaml").write_text(dump(configuration))
    said = torchrun("train", tmp_path / "config.yaml")
    assert "tokens and actions: " in said and said.count("held out") == 1
    assert (tmp_path / "run" / "report.html").is_file()
    written = tmp_path / "run" / "evaluation.json"
    live = json.loads(written.read_text())
    for arguments in ([], ["parallel.pp=2", "parallel.ep=1"], ["--blank=vision"]):
        written.unlink(missing_ok=True)
        assert "held out" in torchrun("evaluate", tmp_path / "run", *arguments)
        if "--blank=vision" not in arguments:
            assert not unlike("evaluation", json.loads(written.read_text()), live)
    assert (tmp_path / "run" / "evaluation-blank-vision.json").is_file() and not written.exists()
