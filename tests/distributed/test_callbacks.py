"""Callbacks on several ranks: what one of them wishes all do, and an error in any hook ends all."""

import json
import os
import signal
import subprocess
import sys
from textwrap import dedent

import pytest
import torch.distributed as dist

from mmoe.config.load import dump
from mmoe.monitoring.metrics import state_digest
from mmoe.training.decision import Decision
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.conftest import REPOSITORY
from tests.distributed.test_training import LAYOUTS, tree
from tests.training.callbacks import HOOKS, Log, Wishes, failing
from tests.training.test_callbacks import folder as folder

CHOSEN = {name: LAYOUTS[name] for name in ("dp2", "ep2", "pp2")}


def train(configuration, callbacks, stop_at=None, resume=False) -> tuple:
    """(steps done, decisions, hooks called, digest, error) of a session."""
    log = Log()
    trainer = Trainer(Run.build(configuration), [*callbacks, log], stop_at)
    if resume:
        trainer.resume()
    error = None
    try:
        trainer.train()
    except (RuntimeError, ValueError) as failure:
        error = str(failure)
    names = [what for _, what in log.calls]
    told = [name.split()[1] for name in names if name.startswith("on_step")]
    return trainer.state.step, told, names, state_digest(trainer.state), error


@pytest.mark.parametrize("layout", CHOSEN)
def test_what_one_rank_wishes_is_done_by_all(two, folder, tmp_path, layout):
    many = tree(folder, tmp_path / "many", **CHOSEN[layout])
    for rank in (0, 1):
        skips = two.run(train, many.model_copy(), [Wishes(Decision.SKIP, 2, rank)], 2)
        assert [answer[:2] for answer in skips] == [(2, ["GO", "SKIP"])] * 2
    wishes = [Wishes(Decision.SKIP, 3, 0), Wishes(Decision.STOP, 3, 1)]
    stops = two.run(train, many, wishes, 5, True)
    assert [answer[:2] for answer in stops] == [(2, [])] * 2


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_roll_back_that_one_rank_wishes_changes_nothing_of_the_run(two, folder, tmp_path, layout):
    rolled = tree(folder, tmp_path / "rolled", **CHOSEN[layout])
    whole = tree(folder, tmp_path / "whole", **CHOSEN[layout])
    answers = two.run(train, rolled, [Wishes(Decision.ROLL_BACK, 5, 1)], 6)
    expected = two.run(train, whole, [], 6)
    assert [answer[1] for answer in answers] == [["GO"] * 7] * 2
    assert [answer[3] for answer in answers] == [answer[3] for answer in expected]


@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ep2", "pp2"))])
def test_an_error_in_any_hook_ends_all_ranks_and_closes_all_callbacks(two, folder, tmp_path, layout):
    for hook in HOOKS:
        many = tree(folder, tmp_path / hook, **CHOSEN[layout])
        for _, _, hooks, _, error in two.run(train_failing, many, hook):
            assert error == "meant"
            assert hooks == [] if hook == "on_start" else hooks[-1] == "close"


def train_failing(configuration, hook) -> tuple:
    """As `train`, with callbacks that raise, which no queue between processes can carry."""
    return train(configuration, failing(hook), 3)


def test_an_error_on_one_rank_alone_ends_the_other_which_names_it(folder, tmp_path):
    """Both close their callbacks: the one whose peer is gone is ended by the error of the collective it waits in."""
    (tmp_path / "config.yaml").write_text(dump(tree(folder, tmp_path / "run", dp_shard=2, timeout_seconds=30)))
    script = f"""
        import time
        from pathlib import Path
        from mmoe.config.load import load
        from mmoe.recipe.config import RunConfig
        from mmoe.runtime import launch
        from mmoe.runtime.launch import distributed_context
        from mmoe.training.loop import Trainer
        from mmoe.training.run import Run
        from tests.training.callbacks import Log, failing
        config = load(RunConfig, {str(tmp_path / "config.yaml")!r})
        log, write = Log(), launch.record_error
        def write_late(folder, rank, error, **known):  # SIGTERM comes earlier: torchrun sees that rank 1 has failed
            time.sleep(3 * (rank == 0))
            write(folder, rank, error, **known)
        launch.record_error = write_late
        try:
            with distributed_context(30, Path(config.training.run)):
                Trainer(Run.build(config), [*failing("on_step", rank=1), log]).train()
        finally:
            Path(f"{tmp_path!s}/closed-{{log.calls[-1][1]}}-{{log.calls.count(log.calls[-1])}}").touch()
    """
    (tmp_path / "script.py").write_text(dedent(script))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    errors = [json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()]
    told = {error["rank"]: error for error in errors}
    assert (told[1]["message"], told[1]["after"], told[1]["step"]) == ("RuntimeError: meant", None, 1)
    assert told[0]["after"].startswith("rank 1 failed: RuntimeError: meant"), done.stderr[-2000:]
    assert [path.name for path in tmp_path.glob("closed-*")] == ["closed-close-1"]


class Signaled(Log):
    """Sends its process a signal, on one rank, after a step."""

    def __init__(self, number, rank, step):
        super().__init__()
        self.number, self.rank, self.step = number, rank, step

    def on_step(self, result):
        if result.step == self.step and dist.get_rank() == self.rank:
            os.kill(os.getpid(), self.number)


def train_signaled(configuration, step) -> tuple:
    """(steps done, signal that all know of) of a session of four steps in which rank 1 gets SIGTERM after `step`."""
    trainer = Trainer(Run.build(configuration), [Signaled(signal.SIGTERM, 1, step)], 4)
    trainer.train()
    return trainer.state.step, trainer.interrupted


@pytest.mark.parametrize("step, last", [(2, 3), (4, 4)])
def test_a_signal_to_one_rank_is_known_to_all_of_them_even_after_the_last_step(two, folder, tmp_path, step, last):
    many = tree(folder, tmp_path / "many", **CHOSEN["dp2"])
    assert two.run(train_signaled, many, step) == [(last, signal.SIGTERM)] * 2


class Fast(Log):
    """Lets an hour pass for one rank before a step."""

    def __init__(self, rank, step):
        super().__init__()
        self.rank, self.step = rank, step

    def before_step(self, data):
        if dist.get_rank() == self.rank and self.trainer.state.step + 1 == self.step:
            self.trainer._saved_at -= 3600
        return Decision.GO


def train_timed(configuration) -> list[int]:
    """Checkpoints of four steps, in which for rank 1 an hour passes in the second."""
    trainer = Trainer(Run.build(configuration), [Fast(1, 2)], 4)
    trainer.train()
    return trainer.checkpoints.steps()


def test_a_checkpoint_that_is_due_by_the_clock_of_one_rank_is_written_by_all(two, folder, tmp_path):
    many = tree(folder, tmp_path / "many", **CHOSEN["dp2"])
    checkpoint = many.checkpoint.model_copy(update={"every_steps": None, "every_minutes": 59.0})
    assert two.run(train_timed, many.model_copy(update={"checkpoint": checkpoint})) == [[2, 4]] * 2
