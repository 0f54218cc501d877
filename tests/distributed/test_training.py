"""Whole runs on several ranks: the same steps as one process, and checkpoints that go on in another layout."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmoe.config.load import validate
from mmoe.data.load.stream import StepData
from mmoe.monitoring.metrics import MetricsCallback
from mmoe.monitoring.reader import RunReader
from mmoe.parallel.broadcast import shared_steps
from mmoe.parallel.mesh import Mesh, ParallelDims
from mmoe.recipe.config import RunConfig
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.schema.counts import Counts, columns
from mmoe.schema.modality import Modality
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.data.synthetic import BUTTONS, button_sample, write_source, write_sources
from tests.models.random_batch import random_batch
from tests.training.test_trainer import config

EXACT = {
    "precision": {"compute": "float64"},
    "model__moe__expert_backend": "loop",
    "model__moe__capacity_factor": 1.0,
    "optim__matrices": None,
    "losses__contrastive": {"weight": 0.3},
    "training__micro_batch_sequences": 1,
}
LAYOUTS = {"dp2": {}, "ep2": {"ep": 2}, "tp2": {"tp": 2}, "cp2": {"cp": 2}, "pp2": {"pp": 2}}
FIGURES = ("loss", "grad_norm", "loss_ce", "loss_contrastive", "loss_action", "drop_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    write_sources(root)
    rng = np.random.default_rng(9)
    pressed = {s: [button_sample(rng, f"{s}{i}") for i in range(n)] for s, n in (("train", 24), ("heldout", 6))}
    shutil.rmtree(root / "clip")
    write_source(root / "clip", pressed, categories=BUTTONS)
    return root


def train(configuration: RunConfig, stop_at: int) -> list[dict]:
    """The records of the run so far, after training (or going on) to step `stop_at`."""
    run = Run.build(configuration)
    run.folder.mkdir(exist_ok=True)
    trainer = Trainer(run, [MetricsCallback(PeakMemory())], stop_at)
    if trainer.checkpoints.latest_step() is not None:
        trainer.resume()
    trainer.train()
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def figures(records: list[dict]) -> np.ndarray:
    return np.array([[record[name] for name in FIGURES] for record in records])


def tree(folder: Path, run: Path, **parallel) -> RunConfig:
    configuration = config(folder, run, **EXACT).model_dump(mode="json")
    return validate(RunConfig, configuration | {"parallel": configuration["parallel"] | parallel}, "test")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_of_a_run_are_those_of_one_process_also_over_a_change_of_layout(two, folder, tmp_path, layout):
    """Accumulation, contrastive groups over the whole batch, dropped tokens: three steps, saved, two more."""
    expected = train(tree(folder, tmp_path / "one"), 5)
    many = tree(folder, tmp_path / "many", **LAYOUTS[layout])
    two.run(train, many, 3)
    records = train(tree(folder, tmp_path / "many"), 5)  # one process goes on
    np.testing.assert_allclose(figures(records), figures(expected), rtol=1e-10)
    for ours, theirs in zip(records, expected, strict=True):
        for name in ("contrastive_pairs", "positions", "tokens", "slots_routed", "slots_dropped"):
            assert ours[name] == theirs[name]
    replicas = 2 if layout in ("dp2", "ep2") else 1
    for name in ("attention_balance", "vision_balance"):
        assert all(1.0 <= record[name] <= replicas for record in records[:3])
        assert [record[name] for record in records[3:]] == [1.0, 1.0]
    for name in ("expert_load", "expert_drops", "would_drop"):
        ours, theirs = (
            np.concatenate([chunk.values for chunk in RunReader(tmp_path / run).tables(name)])
            for run in ("many", "one")
        )
        np.testing.assert_array_equal(ours, theirs)


def test_one_process_goes_on_as_two(two, folder, tmp_path):
    expected = train(tree(folder, tmp_path / "one"), 4)
    train(tree(folder, tmp_path / "many"), 2)
    records = two.run(train, tree(folder, tmp_path / "many", ep=2), 4)[0]
    np.testing.assert_allclose(figures(records), figures(expected), rtol=1e-10)


CHAINS = {
    "two": [{"tp": 2}, {"pp": 2}, {"cp": 2, "ep": 2}],
    "four": [{"tp": 2, "ep": 2}, {"pp": 2, "tp": 2}, {"cp": 2, "ep": 4}, {"pp": 2, "ep": 2, "zero": 1}],
}


@pytest.mark.parametrize("pool", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_layout_to_layout(request, folder, tmp_path, pool):
    """Weights and optimizer states that one mesh has cut are put together and cut anew for the next."""
    chain, ranks = CHAINS[pool], request.getfixturevalue(pool)
    expected = train(tree(folder, tmp_path / "one"), 2 * len(chain))
    for number, layout in enumerate(chain, 1):  # the second step's loss shows which optimizer states the first one had
        records = ranks.run(train, tree(folder, tmp_path / "many", **layout), 2 * number)[0]
    assert [record["session"] for record in records] == [step // 2 for step in range(2 * len(chain))]
    np.testing.assert_allclose(figures(records), figures(expected), rtol=1e-10)


def received(folder: Path) -> list:
    """What each rank gets of two steps of two batches, which only the first rank of a replica reads."""
    mesh = Mesh(ParallelDims(tp=2))

    class Once:
        def steps(self):
            assert dist.get_rank() == 0, "a peer decoded"
            for step in range(2):
                batches = iter([random_batch(2 * step + i) for i in (0, 1)])
                yield StepData(batches, Counts(np.full(columns(), step)), {"step": step}, {}, (1.5, 2.0))

    steps = shared_steps(Once(), mesh, 2, torch.device("cpu"))
    return [((data.counts.positions, data.balance), data.plan, list(data.batches)) for data in islice(steps, 2)]


def test_peers_receive_the_batches_that_one_rank_decodes(two, tmp_path):
    for given in two.run(received, tmp_path):
        for step, (counts, plan, batches) in enumerate(given):
            assert (counts, plan) == ((step, (1.5, 2.0)), {"step": step})
            for number, batch in enumerate(batches):
                expected = random_batch(2 * step + number)
                assert replace(batch, values={}).documents == expected.documents
                for name in ("token_ids", "document", "offset_ns", "labels", "loss_weight", "action_mask"):
                    assert torch.equal(getattr(batch, name), getattr(expected, name))
                assert torch.equal(batch.pairs.span, expected.pairs.span)
                for kind in Modality:
                    if kind in expected.values:
                        assert torch.equal(batch.values[kind].values, expected.values[kind].values)
