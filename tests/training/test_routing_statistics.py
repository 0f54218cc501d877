"""What a run records of its routers: the same however a step is cut, recomputed, clipped, or followed by evaluation."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint

from mmoe.monitoring.metrics import MetricsCallback
from mmoe.monitoring.reader import RunReader
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.schema.modality import Modality
from mmoe.training.callback import Callback
from tests.training import test_trainer
from tests.training.test_trainer import config, trainer

folder = test_trainer.folder

COUNTS = ("expert_load", "expert_drops", "would_drop")
MEANS = ("router_grad_norm", "expert_importance", "router_logit_mean", "router_logit_variance")
SCALARS = ("drop_rate", "load_max_over_mean", "router_entropy", "slots_routed", "slots_dropped")
STEPS = 3


def records(folder, run, *callbacks, recompute=False, **changes) -> RunReader:
    tree = config(folder, run, precision__compute="float64", model__moe__expert_backend="loop", **changes)
    with PeakMemory() as memory:
        made = trainer(tree, *callbacks, MetricsCallback(memory), stop_at=STEPS)
        if recompute:
            for block in made.run.model.decoder.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        made.train()
    return RunReader(run)


def table(reader: RunReader, name: str) -> np.ndarray:
    return np.concatenate([chunk.values for chunk in reader.tables(name)])


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """Two layers of experts with a capacity that drops, a step in one micro-batch."""
    changes = {"training__micro_batch_sequences": 4, "model__moe__layer_freq": 1, "model__moe__capacity_factor": 1.0}
    found = records(folder, tmp_path_factory.mktemp("reference") / "run", **changes)
    return changes, found


def check(found: RunReader, expected: RunReader) -> None:
    for name in COUNTS:
        np.testing.assert_array_equal(table(found, name), table(expected, name))
    for name in MEANS:  # recorded as float32
        np.testing.assert_allclose(table(found, name), table(expected, name), rtol=1e-6, atol=1e-12)
    mine, theirs = found.columns(*SCALARS), expected.columns(*SCALARS)
    for name in SCALARS:
        assert len(mine[name]) == STEPS
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-8)


def test_what_is_recorded_is_not_empty_and_adds_up(reference):
    reader = reference[1]
    load, drops = table(reader, "expert_load"), table(reader, "expert_drops")
    assert load.shape == (STEPS, 2, len(Modality), len(test_trainer.MAKERS), 4) and drops.sum((0, 2, 3, 4)).min() > 0
    assert table(reader, "router_grad_norm").min() > 0
    columns = reader.columns("tokens", *SCALARS)
    tokens = np.diff(columns["tokens"], prepend=0)
    np.testing.assert_array_equal(load.sum((2, 3, 4)), np.stack([2 * tokens] * 2, axis=1))  # top 2 in two layers
    np.testing.assert_array_equal(columns["slots_routed"], np.cumsum(load.sum((1, 2, 3, 4))))
    np.testing.assert_array_equal(columns["slots_dropped"], np.cumsum(drops.sum((1, 2, 3, 4))))
    # The run's own capacity is the first factor of the grid.
    np.testing.assert_array_equal(table(reader, "would_drop")[..., 0], drops.sum((2, 3, 4)))
    assert load[:, :, Modality.VISION, list(test_trainer.MAKERS).index("clip")].sum() > 0


def test_the_sums_of_tables_lose_nothing_whatever_their_cadence_and_over_a_resume(folder, tmp_path, reference):
    """Tables every third step: a run that stops after two writes them there, and one that was killed does not."""
    changes, expected = reference
    changes = changes | {"monitoring__tables_every_steps": 3, "monitoring__log_every_steps": 2}
    tree = config(folder, tmp_path / "run", precision__compute="float64", model__moe__expert_backend="loop", **changes)
    tree = tree.model_copy(update={"checkpoint": tree.checkpoint.model_copy(update={"every_steps": 1})})
    with PeakMemory() as memory:

        class Kill(Callback):
            def on_step(self, result):
                if result.step == 3:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer(tree, Kill(), MetricsCallback(memory), stop_at=STEPS).train()
        again = trainer(tree, MetricsCallback(memory), stop_at=STEPS)
        again.resume()
        assert again.state.step == 2
        again.train()
    reader = RunReader(tmp_path / "run")
    assert [chunk.steps.tolist() for chunk in reader.tables("expert_load")] == [[3]]
    for name in COUNTS:
        np.testing.assert_array_equal(table(reader, name)[0], table(expected, name).sum(0))
    columns, whole = reader.columns("tokens", "packing_efficiency"), expected.columns("tokens", "positions")
    assert columns["step"].tolist() == [2, 3] and columns["tokens"].tolist() == whole["tokens"][1:].tolist()
    assert columns["packing_efficiency"][0] == whole["tokens"][1] / whole["positions"][1]


@pytest.mark.parametrize("micro", [1, 2])
def test_cutting_a_step_changes_nothing(folder, tmp_path, reference, micro):
    changes, expected = reference
    check(records(folder, tmp_path / "run", **changes | {"training__micro_batch_sequences": micro}), expected)


def test_recomputation_changes_nothing(folder, tmp_path, reference):
    changes, expected = reference
    check(records(folder, tmp_path / "run", recompute=True, **changes), expected)


def test_evaluation_in_between_changes_nothing(folder, tmp_path, reference):
    class Evaluate(Callback):
        def on_start(self, trainer):
            self.run = trainer.run

        def on_step(self, result):
            self.run.model.eval()
            with torch.no_grad():
                for batch in self.run.heldout(isolated=False):
                    assert self.run.model(batch).routing is None

    changes, expected = reference
    check(records(folder, tmp_path / "run", Evaluate(), **changes), expected)


def test_router_gradients_are_those_before_clipping(folder, tmp_path, reference):
    changes, expected = reference
    found = records(folder, tmp_path / "run", optim__clip={"max_norm": 1e-6}, **changes)
    assert (table(found, "router_grad_norm")[0] == table(expected, "router_grad_norm")[0]).all()


def test_tensorboard_has_a_curve_for_each_expert(folder, tmp_path, reference):
    changes, expected = reference
    records(folder, tmp_path / "run", **changes, monitoring__sinks=[{"kind": "tensorboard"}])
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    curve = board.Scalars("routing/router_grad_norm/layer1/expert3")
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == pytest.approx(table(expected, "router_grad_norm")[:, 1, 3])
    load = [point.value for point in board.Scalars("routing/expert_load/layer0/expert0")]
    assert load == table(expected, "expert_load")[:, 0, :, :, 0].sum((1, 2)).tolist()
    assert [point.value for point in board.Scalars("loss/loss")] == pytest.approx(expected.columns("loss")["loss"])
