"""Runs the training loop: next batch, step, callbacks, checkpoint; what the ranks decide; what ends it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import Any

import torch.distributed as dist

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.config.load import dump
from mmoe.data.load.stream import StepData
from mmoe.errors import CheckpointError, DivergenceError
from mmoe.runtime.agreement import ProcessGroupRanks
from mmoe.runtime.interrupt import INTERRUPTS, answered
from mmoe.runtime.launch import outlast_sigterm
from mmoe.runtime.watch import StepWatchdog
from mmoe.training.callback import Callback, Callbacks, EvaluationResult
from mmoe.training.decision import Agreement, Decision, agree
from mmoe.training.gradients import StepGradients, StepSetting
from mmoe.training.run import CONFIG, Run
from mmoe.training.state import TrainState
from mmoe.training.step import StepResult, train_step


class Trainer:
    """Trains a run from where its state stands to its last step, or to `stop_at`."""

    def __init__(self, run: Run, callbacks: list[Callback], stop_at: int | None = None) -> None:
        config = run.config
        self.run, self.state, self.callbacks = run, TrainState.from_run(run), Callbacks(callbacks)
        self.batch, self.last_step = run.resolved.batch, run.resolved.batch.iterations
        self.stop_at = self.last_step if stop_at is None else min(stop_at, self.last_step)
        self.setting = StepSetting.from_run(run.resolved, run.tokenizers.vocabulary, run.device, run.ranks)
        self.checkpoints = CheckpointManager(run.folder / "checkpoints", config.checkpoint)
        self.saved = 0  # the step of the last checkpoint
        self.stop_requested = 0  # the number of a signal to this process that asks for the end
        self.interrupted = 0  # of one to any process, known to all after the same step
        self.stopping = False  # the step under way is the last one, for that or for another reason
        self._watch = StepWatchdog(config.parallel.timeout_seconds, run.folder)
        self._clock = time.monotonic  # by which checkpoints are written
        self._saved_at = self._clock()
        self._late = False  # a checkpoint is due by the clock of a rank, known to all
        self._rolled_back: set[int] = set()  # steps that were dropped by going back

    def train(self) -> None:
        """Train to the end of the session, saving and telling the callbacks on the way, and close them in any case.

        A signal that ended it before is `interrupted`, on every process.
        Raises DivergenceError, any error of a callback, and at the end the OutputError of one. With a process group an
        error leaves SIGTERM ignored: the process is taken to end by it.
        """
        state, self._saved_at = self.state, self._clock()
        with _stop_on_interrupt(self), self._watch, self.callbacks.session(self):
            steps = self._steps()
            while state.step < self.stop_at and not self.stopping:
                result = self._next(steps)
                if result.decision is Decision.ROLL_BACK:
                    del steps  # its readers end before the stream is set back
                    self._roll_back()
                    steps = self._steps()
                elif result.decision is not Decision.STOP:
                    self.beat("callbacks")
                    self.callbacks.tell(methodcaller("on_step", result))
                    if self._late or self.checkpoints.config.due(state.step, self.last_step):
                        self.save()
            if state.step != self.saved:
                self.save()
            if not self.stopping:  # a signal may have come after the last step was agreed on
                self.interrupted = agree(Agreement(signal=self.stop_requested)).signal
        self._raise_unwritten()

    def write_rest(self) -> None:
        """Let callbacks write what a checkpoint kept for them, where no step is left. Raises OutputError."""
        with self.callbacks.session(self):
            pass
        self._raise_unwritten()

    def beat(self, phase: str) -> None:
        """Tell the watcher of hangs that this rank goes on, in `phase`; a callback that takes long calls this too."""
        self._watch.beat(self.state.step, phase)

    def train_step(self, data: StepData, waited: float = 0.0) -> StepResult:
        """Do one step on `data`, or what the callbacks of all ranks decide instead.

        The loop has `waited` so many seconds for the data.
        """
        wish = self.callbacks.wish(methodcaller("before_step", data))
        return train_step(self.state, data, self.run, self.setting, partial(self._decide, wish), waited)

    def tell_evaluation(self, result: EvaluationResult) -> None:
        """Tell every callback of figures that one of them has measured."""
        self.callbacks.tell(methodcaller("on_evaluation", result))

    def save(self) -> None:
        """Write a checkpoint of the step that the run stands at, and tell the callbacks."""
        self.beat("checkpoint")
        path = self.checkpoints.save(self.state.step, self._sections(), {CONFIG: dump(self.run.config)})
        self.saved, self._saved_at = self.state.step, self._clock()
        self.callbacks.tell(methodcaller("on_checkpoint", path))

    def resume(self, step: int | None = None, check: Callable[[int], None] | None = None) -> None:
        """Continue from the newest whole checkpoint, or from the one after `step`; newer ones are set aside.

        `check` is told of the step that was found, before anything is loaded, and may refuse it. Raises CheckpointError
        where none is whole, or where the data is not that of the checkpoint.
        """
        self.state.session = 1 + self._load(step, check, self.callbacks.load_state_dict)

    def _steps(self) -> Iterator[StepData]:
        return self.run.ranks.steps(self.state.stream, self.batch.accumulation)

    def _next(self, steps: Iterator[StepData]) -> StepResult:
        self._watch.beat(self.state.step + 1, "data")
        started = time.perf_counter()
        data = next(steps)
        waited = time.perf_counter() - started
        self._watch.beat(self.state.step + 1, "step")
        return self.train_step(data, waited)

    def _decide(self, wish: Decision, gradients: StepGradients) -> Decision:
        """The decision of all ranks; one that was told to stop, or whose disk is full, makes the step the last."""
        wish = max(wish, self.callbacks.wish(methodcaller("before_update", gradients)))
        late, full = self.checkpoints.config.late(self._clock() - self._saved_at), self.callbacks.unwritten is not None
        agreed = agree(Agreement(wish, self.stop_requested, full, late))
        self.interrupted, self._late = agreed.signal, agreed.save
        self.stopping = bool(agreed.signal) or agreed.last or agreed.decision is Decision.STOP
        return agreed.decision

    def _roll_back(self) -> None:
        dropped = self.state.step + 1
        self.beat("roll back")
        if dropped in self._rolled_back:
            raise DivergenceError(
                f"{self.run.folder}: step {dropped} was rolled back before, and the same would come again; let the "
                "callback that asks for it skip the step instead, or resume with a lower rate by --set optim.lr.peak="
            )
        self._rolled_back.add(dropped)
        if self.checkpoints.latest_step() is None:
            raise DivergenceError(
                f"{self.run.folder}: step {dropped} is to be rolled back and there is no checkpoint yet; set a smaller "
                "checkpoint.every_steps or checkpoint.every_minutes"
            )
        self._load(None, None, lambda states: self.callbacks.roll_back(self.state.step, states))

    def _load(
        self, step: int | None, check: Callable[[int], None] | None, tell: Callable[[dict[str, Any]], None]
    ) -> int:
        """Take the state of a checkpoint, and `tell` the callbacks theirs; gives the session that wrote it."""
        sections = self._sections()
        found = self.checkpoints.load(sections, step, check)
        self.state.check_data(sections, self.run)
        try:
            self.state.load_state_dict(sections)
            session = sections["trainer"]["session"]
            tell(sections["callbacks"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{self.checkpoints.folder}: the state of step {found} is not that of a training ({error!r}); resume "
                "from another by --from-step"
            ) from error
        self.checkpoints.go_back(found)
        self.saved = self.state.step
        return session

    def _raise_unwritten(self) -> None:
        """Every rank leaves where one could not write."""

        def check() -> None:
            if self.callbacks.unwritten is not None:
                raise self.callbacks.unwritten

        ProcessGroupRanks().every(check)

    def _sections(self) -> dict[str, Any]:
        return self.state.state_dict() | {"callbacks": self.callbacks.state_dict()}


@contextmanager
def _stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) is answered at once and ends the run after a step, saved; the second one kills it.

    A second SIGTERM does nothing where there are other processes: a scheduler and torchrun may both send one.
    """

    def kills(number: int) -> bool:
        return number == signal.SIGINT or not dist.is_initialized()

    def handler(number: int, frame: Any) -> None:
        trainer.stop_requested = number
        signal.signal(number, previous[number] if kills(number) else signal.SIG_IGN)

    def answer() -> str:
        return f"stopping after step {min(trainer.state.step + 1, trainer.stop_at)}, saved; again to kill"

    previous: dict[int, Any] = {number: signal.signal(number, handler) for number in INTERRUPTS}
    try:
        with answered(answer, kills):
            yield
    except Exception:
        if dist.is_initialized():
            previous.pop(signal.SIGTERM)
            outlast_sigterm()
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
