"""What a run records of its routers: the same however a step is cut, recomputed, clipped, or followed by evaluation."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint

from mmoe.monitoring.metrics import MetricsWriter
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.training.callback import Callback
from tests.training import test_trainer
from tests.training.test_trainer import config, trainer

folder = test_trainer.folder

COUNTS = (
    "expert_load",
    "expert_drops",
    "expert_load_by_source",
    "expert_drops_by_source",
    "would_drop",
    "drop_rate",
    "load_max_over_mean",
)
FIGURES = ("router_grad_norm", "expert_importance", "router_logit_mean", "router_logit_variance", "router_entropy")
STEPS = 3


def records(folder, run, *callbacks, recompute=False, **changes) -> list[dict]:
    tree = config(folder, run, precision__compute="float64", model__moe__engine="loop", **changes)
    with PeakMemory() as memory:
        made = trainer(tree, *callbacks, MetricsWriter(memory), stop_at=STEPS)
        if recompute:
            for block in made.run.model.decoder.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        made.train()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """Two layers of experts with a capacity that drops, a step in one micro-batch."""
    changes = {"training__micro_batch_sequences": 4, "model__moe__every": 1, "model__moe__capacity_factor": 1.0}
    found = records(folder, tmp_path_factory.mktemp("reference") / "run", **changes)
    return changes, found


def check(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected):
        for key in COUNTS:
            assert mine[key] == theirs[key], key
        for key in FIGURES:
            a, b = mine[key], theirs[key]
            a, b = (list(x.values()) if isinstance(x, dict) else x for x in (a, b))
            torch.testing.assert_close(torch.tensor(a).double(), torch.tensor(b).double(), rtol=1e-8, atol=1e-12)


def test_what_is_recorded_is_not_empty(reference):
    for record in reference[1]:
        assert list(record["expert_load"]) == list(record["router_grad_norm"]) == ["0", "1"]
        assert sum(record["expert_drops"]["1"]) > 0 and min(record["router_grad_norm"]["0"]) > 0
        valid = 2 * record["useful_positions"]  # top 2
        for layer in ("0", "1"):
            assert sum(record["expert_load"][layer]) == valid
            # The run's own capacity is the first factor of the grid.
            assert record["would_drop"][layer][0] == sum(record["expert_drops"][layer])
            for table, total in (("expert_load_by_source", "expert_load"), ("expert_drops_by_source", "expert_drops")):
                cells = [cell for kinds in record[table][layer].values() for cell in kinds.values()]
                assert torch.tensor(cells).sum(0).tolist() == record[total][layer]
            assert "vision" in record["expert_load_by_source"][layer]["clip"]
            assert record["expert_load_by_source"][layer].keys() <= test_trainer.MAKERS.keys()


@pytest.mark.parametrize("micro", [1, 2])
def test_cutting_a_step_changes_nothing(folder, tmp_path, reference, micro):
    changes, expected = reference
    check(records(folder, tmp_path / "run", **changes | {"training__micro_batch_sequences": micro}), expected)


def test_recomputation_changes_nothing(folder, tmp_path, reference):
    changes, expected = reference
    check(records(folder, tmp_path / "run", recompute=True, **changes), expected)


def test_evaluation_in_between_changes_nothing(folder, tmp_path, reference):
    class Evaluate(Callback):
        def on_step(self, trainer, result):
            trainer.run.model.eval()
            with torch.no_grad():
                for batch in trainer.run.heldout(isolated=False):
                    assert trainer.run.model(batch).routing is None

    changes, expected = reference
    check(records(folder, tmp_path / "run", Evaluate(), **changes), expected)


def test_router_gradients_are_those_before_clipping(folder, tmp_path, reference):
    changes, expected = reference
    first = records(folder, tmp_path / "run", optim__clip={"max_norm": 1e-6}, **changes)[0]
    assert first["router_grad_norm"] == expected[0]["router_grad_norm"]


def test_tensorboard_has_a_curve_for_each_expert(folder, tmp_path, reference):
    changes, expected = reference
    records(folder, tmp_path / "run", **changes, monitoring__tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    curve = board.Scalars("router_grad_norm/layer1/expert3")
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == pytest.approx([r["router_grad_norm"]["1"][3] for r in expected])
    assert len(board.Scalars("expert_load/layer0/expert0")) == 3
