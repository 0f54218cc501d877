"""What callbacks are told, what they may decide, and that they are closed whatever ends a run."""

import errno
import logging
import os

import numpy as np
import pytest
import torch

from mmoe.commands import session
from mmoe.commands.console import Console
from mmoe.errors import ConfigError, DivergenceError, OutputError
from mmoe.monitoring.lines import LineFile
from mmoe.monitoring.metrics import MetricsCallback, state_digest
from mmoe.monitoring.reader import RunReader
from mmoe.monitoring.sinks.jsonl import JsonlSink
from mmoe.recipe.callbacks import CALLBACKS, CallbackConfig
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.training.callback import Callback
from mmoe.training.decision import Decision
from tests.training import test_trainer
from tests.training.callbacks import HOOKS, Log, Measures, Raises, Wishes, failing
from tests.training.test_trainer import config, trainer

folder = test_trainer.folder


def digest(one) -> str:
    return state_digest(one.state)


def test_the_hooks_of_a_session_in_their_order(folder, tmp_path):
    log = Log()
    trainer(config(folder, tmp_path / "run", checkpoint__every_steps=2), log, stop_at=3).train()
    step = ["before_step", "before_update", "on_step GO"]
    assert [what for _, what in log.calls] == [
        "on_start", *step, *step, "on_checkpoint step-00000002", *step, "on_checkpoint step-00000003", "close",
    ]  # fmt: skip
    assert [done for done, what in log.calls if what == "before_update"] == [0, 1, 2]
    assert [done for done, what in log.calls if what == "on_step GO"] == [1, 2, 3]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_any_hook_ends_the_run_with_every_callback_told_and_closed(folder, tmp_path, caplog, hook):
    first, last = Log(), Log()
    last.name = "last"
    run = trainer(config(folder, tmp_path / "run", checkpoint__every_steps=1), first, *failing(hook), last, stop_at=2)
    with pytest.raises(ValueError if hook == "on_error" else RuntimeError, match="meant"):
        run.train()
    ends = ["close"] if hook == "close" else ["on_error meant", "close"]
    assert [what for _, what in first.calls][-len(ends) :] == ends
    if hook == "on_start":
        assert last.calls == []  # it was not started
    else:
        assert [what for _, what in last.calls][-len(ends) :] == ends
    assert [what for _, what in first.calls].count("close") == 1
    assert ("failed too" in caplog.text) == (hook == "on_error")
    assert run.state.step == {"on_start": 0, "before_step": 0, "before_update": 0, "close": 2}.get(hook, 1)
    kept = run.checkpoints.latest_step()
    assert kept == {"close": 2, "on_checkpoint": 1}.get(hook)
    again = trainer(config(folder, tmp_path / "run", checkpoint__every_steps=1), stop_at=3)
    if kept is not None:
        again.resume()
    again.train()
    whole = trainer(config(folder, tmp_path / "whole"), stop_at=3)
    whole.train()
    assert digest(again) == digest(whole)  # nothing that was saved has suffered


def test_what_cannot_be_written_ends_the_run_after_the_next_step_saved(folder, tmp_path):
    log = Log()
    run = trainer(config(folder, tmp_path / "run"), Raises("on_step", OutputError("the disk is full")), log)
    with pytest.raises(OutputError, match="the disk is full"):
        run.train()
    assert run.state.step == 2 and run.checkpoints.latest_step() == 2
    assert [what for _, what in log.calls].count("on_step GO") == 2  # told of the step that another could not write


@pytest.mark.parametrize("hook", ["before_step", "before_update"])
def test_what_cannot_be_written_before_an_update_ends_the_run_saved_too(folder, tmp_path, hook):
    run = trainer(config(folder, tmp_path / "run"), Raises(hook, OutputError("the disk is full")))
    with pytest.raises(OutputError, match="the disk is full"):
        run.train()
    assert run.state.step == 1 and run.checkpoints.latest_step() == 1


def test_a_hook_that_forgets_to_return_its_wish_is_named(folder, tmp_path):
    class Forgets(Callback):
        name = "forgets"

        def before_step(self, data):
            pass

    with pytest.raises(TypeError, match="callback forgets wishes None of a step; return Decision.GO"):
        trainer(config(folder, tmp_path / "run"), Forgets()).train()


@pytest.mark.parametrize("hook", ["before_step", "before_update"])
def test_a_skipped_step_is_counted_and_changes_nothing_but_the_data_that_follows(folder, tmp_path, hook):
    changes = {"model__moe__bias_update_rate": 0.01, "model__moe__score_func": "sigmoid"}
    log, skips = Log(), Wishes(Decision.SKIP, step=3, hook=hook)
    run = trainer(config(folder, tmp_path / "run", **changes), log, skips, stop_at=2)
    run.train()
    before, position = digest(run), run.state.position
    run = trainer(config(folder, tmp_path / "run", **changes), log, skips, stop_at=3)
    run.resume()
    run.train()
    assert (3, "on_step SKIP") in log.calls
    assert digest(run) == before  # weights, bias and optimizer states, Adam's step count among them
    assert run.state.step == 3 and run.state.position != position
    assert all(p.grad is None for p in run.run.model.parameters())
    # Going on from the checkpoint of a skipped step is as going on without a break.
    resumed = trainer(config(folder, tmp_path / "run", **changes), stop_at=5)
    resumed.resume()
    resumed.train()
    whole = trainer(config(folder, tmp_path / "whole", **changes), Wishes(Decision.SKIP, 3), stop_at=5)
    whole.train()
    assert digest(resumed) == digest(whole)


def test_a_run_that_was_rolled_back_equals_the_one_that_was_not(folder, tmp_path):
    log = Log()
    run = trainer(config(folder, tmp_path / "run", data__workers=1), Wishes(Decision.ROLL_BACK, step=5), log)
    run.train()
    whole = trainer(config(folder, tmp_path / "whole"))
    whole.train()
    assert (3, "on_roll_back 3") in log.calls and [done for done, what in log.calls if "GO" in what] == [
        1, 2, 3, 4, 4, 5, 6, 7, 8,
    ]  # fmt: skip
    assert digest(run) == digest(whole) and run.state.position == whole.state.position


def test_rolling_back_where_it_cannot_help_is_refused(folder, tmp_path):
    with pytest.raises(DivergenceError, match="step 2 is to be rolled back and there is no checkpoint yet"):
        trainer(config(folder, tmp_path / "early"), Wishes(Decision.ROLL_BACK, step=2)).train()
    run = trainer(config(folder, tmp_path / "run"), Wishes(Decision.ROLL_BACK, step=5, times=2))
    with pytest.raises(DivergenceError, match="step 5 was rolled back before, and the same would come again"):
        run.train()
    assert run.state.step == 4 and run.checkpoints.latest_step() == 3


def test_a_stop_drops_the_step_and_saves_what_was_before_it(folder, tmp_path):
    log = Log()
    run = trainer(config(folder, tmp_path / "run"), Wishes(Decision.STOP, step=3), Wishes(Decision.SKIP, 3), log)
    run.train()
    assert run.stopping and not run.interrupted and run.state.step == 2 and run.checkpoints.latest_step() == 2
    assert [what for _, what in log.calls][-2:] == ["on_checkpoint step-00000002", "close"]
    resumed = trainer(config(folder, tmp_path / "run"))
    resumed.resume()
    resumed.train()
    whole = trainer(config(folder, tmp_path / "whole"))
    whole.train()
    assert digest(resumed) == digest(whole)


def test_a_step_whose_gradients_are_not_finite_can_be_skipped(folder, tmp_path):
    class Poison(Callback):
        name = "poison"

        def on_start(self, trainer):
            self.trainer = trainer

        def before_update(self, gradients):
            return Decision.GO if gradients.norm.isfinite() else Decision.SKIP

    run = trainer(config(folder, tmp_path / "run"), Poison())
    with torch.no_grad():
        run.run.model.decoder.norm.weight.fill_(float("nan"))
    before = digest(run)
    Poison.on_start(run.callbacks._all[0], run)
    result = run.train_step(next(run.state.stream.steps()))
    assert result.decision is Decision.SKIP and digest(run) == before and run.state.step == 1


def test_a_step_that_was_skipped_spoils_no_record_of_the_others(folder, tmp_path):
    class Poison(Callback):
        name = "poison"

        def on_start(self, trainer):
            self.trainer, self.weight = trainer, trainer.run.model.decoder.norm.weight

        def before_step(self, data):
            if self.trainer.state.step == 1:
                self.kept = self.weight.detach().clone()
                with torch.no_grad():
                    self.weight.fill_(float("nan"))
            return Decision.GO

        def before_update(self, gradients):
            if gradients.norm.isfinite():
                return Decision.GO
            with torch.no_grad():
                self.weight.copy_(self.kept)
            return Decision.SKIP

    records = {}
    for every in (1, 4):
        changes = {"monitoring__log_every_steps": every, "monitoring__tables_every_steps": 4}
        with PeakMemory() as memory:
            trainer(
                config(folder, tmp_path / str(every), **changes), Poison(), MetricsCallback(memory), stop_at=4
            ).train()
        records[every] = RunReader(tmp_path / str(every)).columns("step", "loss", "loss_ce")
    assert np.isnan(records[1]["loss"]).tolist() == [False, True, False, False]
    for name in ("loss", "loss_ce"):
        np.testing.assert_allclose(records[4][name], [np.nanmean(records[1][name])], rtol=1e-6)


def test_figures_of_one_callback_are_told_to_all(folder, tmp_path):
    log = Log()
    trainer(config(folder, tmp_path / "run"), Measures(1, {"ce": 2.0}), log, stop_at=1).train()
    assert (1, "on_evaluation {'ce': 2.0}") in log.calls


def test_figures_of_an_evaluation_are_in_the_record_of_its_step(folder, tmp_path):
    tree = config(folder, tmp_path / "run", monitoring__log_every_steps=2, monitoring__tables_every_steps=5)
    with PeakMemory() as memory:
        trainer(tree, Measures(3, {"ce_text": 2.5}), MetricsCallback(memory), stop_at=5).train()
    columns = RunReader(tmp_path / "run").columns("eval/ce_text", "positions")
    assert columns["step"].tolist() == [2, 3, 4, 5]
    np.testing.assert_array_equal(columns["eval/ce_text"], [np.nan, 2.5, np.nan, np.nan])
    assert columns["positions"].tolist() == [640 * step for step in columns["step"]]


def test_a_roll_back_takes_its_records_back_and_counts_go_on_from_the_checkpoint(folder, tmp_path):
    with PeakMemory() as memory:
        trainer(config(folder, tmp_path / "run"), Wishes(Decision.ROLL_BACK, step=5), MetricsCallback(memory)).train()
        trainer(config(folder, tmp_path / "whole"), MetricsCallback(memory)).train()
    found, expected = (RunReader(tmp_path / name) for name in ("run", "whole"))
    assert found.undone("loss")["step"].tolist() == [4]
    for name, column in expected.columns("step", "loss", "grad_norm", "positions", "tokens").items():
        np.testing.assert_array_equal(found.columns(name)[name], column)
    for ours, theirs in zip(found.tables("expert_load"), expected.tables("expert_load"), strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)


def test_a_sink_that_cannot_take_its_records_back_ends_the_run_before_any_is_doubled(folder, tmp_path, monkeypatch):
    move = JsonlSink._move

    def full(self, *given):
        monkeypatch.setattr(JsonlSink, "_move", move)
        raise OutputError("the disk is full")

    with PeakMemory() as memory:
        rolls = Wishes(Decision.ROLL_BACK, step=6)
        run = trainer(config(folder, tmp_path / "run"), rolls, MetricsCallback(memory))
        monkeypatch.setattr(JsonlSink, "_move", full)
        with pytest.raises(OutputError, match="the disk is full"):
            run.train()
        resumed = trainer(config(folder, tmp_path / "run"), MetricsCallback(memory))
        resumed.resume()
        resumed.train()
    reader = RunReader(tmp_path / "run")
    assert reader.columns()["step"].tolist() == list(range(1, 9)) and reader.undone()["step"].tolist() == [4, 5]
    assert [step for chunk in reader.tables("expert_load") for step in chunk.steps.tolist()] == list(range(1, 9))


def test_what_the_disk_refused_at_the_last_step_is_written_by_the_same_command(folder, tmp_path, monkeypatch):
    options = {"fresh": False, "stop_after": None, "from_step": None}
    tree = config(folder, tmp_path / "run", training__budget_positions=640 * 4)
    flush = LineFile._flush

    def refuse(self):
        if any('"step": 4' in line for line in self.pending):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "_flush", refuse)
        with pytest.raises(OutputError, match="give the same command again|kept in the checkpoint"):
            session.train(tree, Console(quiet=True), **options)
    assert RunReader(tmp_path / "run").columns()["step"].tolist() == [1, 2, 3]
    session.train(tree, Console(quiet=True), **options)
    assert RunReader(tmp_path / "run").columns()["step"].tolist() == [1, 2, 3, 4]


def test_a_session_that_ends_before_it_begins_says_so(folder, tmp_path):
    tree = config(folder, tmp_path / "run")
    for stop_after in (2, 1):
        console = Console(record=True, file=open(os.devnull, "w"), width=400)
        session.train(tree, console, fresh=False, stop_after=stop_after, from_step=None)
    assert "has its 2 steps already; --stop-after 1 leaves none to do" in console.export_text()


@CALLBACKS.register("stop_after_positions")
class StopConfig(CallbackConfig):
    positions: int

    def build(self):
        callback = Wishes(Decision.STOP, step=self.positions // 640 + 1)
        callback.name = self.label
        return callback


def test_a_callback_that_a_config_names_is_built_and_its_keys_are_checked(folder, tmp_path):
    chosen = [{"kind": "stop_after_positions", "positions": 1300}]
    options = {"fresh": False, "stop_after": None, "from_step": None}
    session.train(config(folder, tmp_path / "run", training__callbacks=chosen), Console(quiet=True), **options)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002"]
    for wrong, sentence in [
        ([{"kind": "stop_after_position"}], "not a kind of callback; did you mean stop_after_positions"),
        ([{"kind": "stop_after_positions", "position": 3}], "position is not a known key; did you mean positions"),
        (chosen * 2, "two are named stop_after_positions; give each a name of its own, e.g. name: stop_"),
        ([{"positions": 3}], "give a mapping that says which callback it is"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            config(folder, tmp_path / "run", training__callbacks=wrong)
    twice = [chosen[0], chosen[0] | {"name": "metrics"}]
    with pytest.raises(ConfigError, match="two callbacks are named metrics"):
        session.train(config(folder, tmp_path / "other", training__callbacks=twice), Console(quiet=True), **options)


def test_what_is_no_callback_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="is no Callback; derive its class from"):
        trainer(config(folder, tmp_path / "run"), object())


def test_an_error_at_the_end_does_not_hide_the_one_that_ended_the_run(folder, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    second = Raises("close", OutputError("closing"))
    run = trainer(config(folder, tmp_path / "run"), Raises("on_step", ValueError("the cause")), second)
    with pytest.raises(ValueError, match="the cause"):
        run.train()
    assert "callback raises in close failed too" in caplog.text and "closing" in caplog.text
