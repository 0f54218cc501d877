"""Callbacks that tests watch a loop with, and disturb it by; importable by processes of a pool."""

import torch.distributed as dist

from mmoe.training.callback import Callback, EvaluationResult
from mmoe.training.decision import Decision

HOOKS = ("on_start", "before_step", "before_update", "on_step", "on_checkpoint", "on_error", "close")


def here(rank: int | None) -> bool:
    """Whether this is the rank; None is every rank."""
    return rank is None or not dist.is_initialized() or dist.get_rank() == rank


class Log(Callback):
    """Notes every hook with the number of steps that were done when it was called."""

    name = "log"

    def __init__(self):
        self.calls = []

    def on_start(self, trainer):
        self.trainer = trainer
        self._note("on_start")

    def before_step(self, data):
        self._note("before_step")
        return Decision.GO

    def before_update(self, gradients):
        self._note("before_update")
        return Decision.GO

    def on_step(self, result):
        self._note(f"on_step {result.decision.name}")

    def on_evaluation(self, result):
        self._note(f"on_evaluation {result.scalars}")

    def on_checkpoint(self, path):
        self._note(f"on_checkpoint {path.name}")

    def on_roll_back(self, step, state):
        self._note(f"on_roll_back {step}")

    def on_error(self, error):
        self._note(f"on_error {error}")

    def close(self):
        self._note("close")

    def _note(self, what):
        self.calls.append((self.trainer.state.step, what))


class Raises(Callback):
    """Raises `error` in a hook of one rank (None: of every rank), at the first call of it."""

    def __init__(self, hook, error, rank=None):
        def fail(*_):
            if here(rank) and not self.done:
                self.done = True
                raise error
            return Decision.GO

        self.name, self.done = f"raises in {hook}", False
        setattr(self, hook, fail)


def failing(hook, rank=None) -> list[Callback]:
    """Callbacks of which one raises in `hook`; for `on_error` another gives the cause."""
    found = [Raises(hook, RuntimeError("meant"), rank)]
    return found if hook != "on_error" else [*found, Raises("on_step", ValueError("meant"), rank)]


class Measures(Callback):
    """Tells figures after a step."""

    name = "measures"

    def __init__(self, step, scalars):
        self.figures = EvaluationResult(step, scalars)

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step(self, result):
        if result.step == self.figures.step:
            self.trainer.tell_evaluation(self.figures)


class Wishes(Callback):
    """Wishes a decision about a step (1-based), `times` times, before the update or `before_step`."""

    def __init__(self, decision, step, rank=None, times=1, hook="before_update"):
        self.name = f"wishes {decision.name}"
        self.decision, self.step, self.rank, self.left = decision, step, rank, times
        setattr(self, hook, self._wish)

    def on_start(self, trainer):
        self.trainer = trainer

    def _wish(self, _):
        if here(self.rank) and self.left and self.trainer.state.step + 1 == self.step:
            self.left -= 1
            return self.decision
        return Decision.GO
