"""Declares callbacks, which watch the loop and may decide about it.

Each callback is one small class; its state is in the checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe.errors import ConfigError, OutputError
from mmoe.training.decision import Decision

if TYPE_CHECKING:
    from mmoe.data.load.stream import StepData
    from mmoe.training.gradients import StepGradients
    from mmoe.training.loop import Trainer
    from mmoe.training.step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Holds figures on held-out data after `step`, by the names that sinks write as ``eval/<name>``.

    They are equal on every rank, but for times.
    """

    step: int
    scalars: dict[str, float]


class Callback:
    """Watches a run: every hook does nothing, and subclasses override those they need.

    Every rank has the same callbacks and calls their hooks in the same order, so a hook may use collectives. An error
    that a hook raises ends the run on every rank. OutputError (a file that cannot be written) ends it saved: after the
    step under way, or the next one.
    """

    name = "callback"  # tells it from the others of a run, in checkpoints too

    def on_start(self, trainer: Trainer) -> None:
        """Begin a session, after the state was resumed and before the first step."""

    def before_step(self, data: StepData) -> Decision:
        """Return a wish about a step before its forward pass; it counts together with that of `before_update`."""
        return Decision.GO

    def before_update(self, gradients: StepGradients) -> Decision:
        """Return a wish about a step whose gradients are known, not yet clipped; their norm may be infinite or NaN."""
        return Decision.GO

    def on_step(self, result: StepResult) -> None:
        """Take note of a step that was taken or skipped, before a checkpoint of it is written."""

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Take note of figures that another callback has measured."""

    def on_checkpoint(self, path: Path) -> None:
        """Take note of a checkpoint, the folder `path`, that is complete."""

    def on_roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Undo what came after `step`.

        `state` is what `state_dict` gave at that step, and is taken back by default.
        """
        self.load_state_dict(state)

    def on_error(self, error: BaseException) -> None:
        """Take note of the `error` that ends the run, before `close`.

        What this raises is logged and does not replace the error.
        """

    def close(self) -> None:
        """Release what `on_start` opened; called once, whatever ended the session, also where `on_start` failed."""

    def state_dict(self) -> dict[str, Any]:
        """Return what to resume from, as JSON can hold it; the first rank's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, before `on_start`."""


class Callbacks:
    """Tells the callbacks of a run, in order, and closes them whatever happens.

    Raises ConfigError for two of one name.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"{callback!r} is no Callback; derive its class from mmoe.training.callback.Callback")
        names = [callback.name for callback in callbacks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"two callbacks are named {', '.join(twice)}; give each of training.callbacks its own name"
            )
        self._all = list(callbacks)
        self.unwritten: OutputError | None = None  # the first thing that a callback of this process could not write

    @contextmanager
    def session(self, trainer: Trainer) -> Iterator[None]:
        """Start all callbacks, and close those that were started when the session ends.

        An error that ends the session is told to them before.
        """
        started: list[Callback] = []
        try:
            for callback in self._all:
                started.append(callback)
                callback.on_start(trainer)
            yield
        except BaseException as error:
            acts = [(c, partial(c.on_error, error)) for c in started] + [(c, c.close) for c in reversed(started)]
            for callback, failure in _failures(acts):
                logger.error(f"callback {callback.name} failed too, at what ended the run: {failure!r}")
            raise
        for _, failure in list(_failures([(callback, callback.close) for callback in reversed(started)])):
            if not isinstance(failure, OutputError):
                raise failure
            self.unwritten = self.unwritten or failure

    def tell(self, hook: Callable[[Callback], None]) -> None:
        """Call `hook` on each callback, also on those behind one that raises OutputError.

        The first OutputError is kept in `unwritten`. The other ranks know nothing of it, so it ends the run by the next
        agreement.
        """
        for callback in self._all:
            try:
                hook(callback)
            except OutputError as error:
                self.unwritten = self.unwritten or error

    def wish(self, hook: Callable[[Callback], Decision]) -> Decision:
        """Return the strongest wish that `hook` gives on this process.

        Every callback is asked, and one that cannot write wishes GO.
        """
        wishes = [Decision.GO]

        def ask(callback: Callback) -> None:
            wish = hook(callback)
            if not isinstance(wish, Decision):
                raise TypeError(f"callback {callback.name} wishes {wish!r} of a step; return Decision.GO or another")
            wishes.append(wish)

        self.tell(ask)
        return max(wishes)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each callback by its name."""
        return {callback.name: callback.state_dict() for callback in self._all}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Hand each callback its state of `states`, by name; one that is new to the run gets an empty one."""
        for callback in self._all:
            callback.load_state_dict(states.get(callback.name, {}))

    def roll_back(self, step: int, states: dict[str, Any]) -> None:
        """Tell each callback that the run went back to `step`, with the state it had then.

        If one cannot write, the run ends at once: a resume undoes the same again, a further step would be doubled.
        """
        for callback in self._all:
            callback.on_roll_back(step, states.get(callback.name, {}))


def _failures(acts: Sequence[tuple[Callback, Callable[[], None]]]) -> Iterator[tuple[Callback, Exception]]:
    """Call all of `acts`, and give those that failed, with what they raised."""
    for callback, act in acts:
        try:
            act()
        except Exception as error:
            yield callback, error
