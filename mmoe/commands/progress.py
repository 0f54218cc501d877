"""Shows the progress of a training session and of an evaluation as bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.commands.console import Console, printable
from mmoe.training.callback import Callback, EvaluationResult
from mmoe.training.loop import Trainer
from mmoe.training.step import StepResult


class ProgressBar(Callback):
    """Shows loss, rate and time left: a bar on a terminal, in a log file a line every tenth of the run."""

    name = "progress"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar, where there is a terminal."""
        self._trainer, self._line_every = trainer, max(1, trainer.last_step // 10)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} | {task.fields[rate]} tokens/s |", markup=False),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            done, total = trainer.state.step, trainer.stop_at
            self._task: Any = self._bar.add_task("", total=total, completed=done, loss="-", rate="-")

    def on_step(self, result: StepResult) -> None:
        """Move the bar, or print a line every tenth of the run."""
        trainer = self._trainer
        loss, rate = f"{float(result.losses.loss):.3f}", f"{result.useful_positions / result.seconds:,.0f}"
        if self._bar:
            self._bar.update(self._task, completed=result.step, loss=loss, rate=rate)
        elif result.step % self._line_every == 0 or result.step == trainer.stop_at:
            left = (trainer.stop_at - result.step) * result.seconds
            self.console.print(
                f"step {result.step}/{trainer.last_step}  loss {loss}  {rate} tokens/s  {left:.0f} s left",
                highlight=False,
            )

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Print what was measured on held-out data."""
        figures = "  ".join(f"{name} {value:.3f}" for name, value in result.scalars.items())
        self.console.print(f"step {result.step}, held out: {figures}", highlight=False, soft_wrap=True)

    def on_roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Set the bar back to where the training goes on from."""
        self.console.print(f"rolled back to step {step}", highlight=False)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the bar as it is, and say so where the run was interrupted."""
        if self._bar:
            self._bar.stop()
        if self._trainer.interrupted and self._trainer.saved == self._trainer.state.step:
            self.console.print(f"interrupted: saved at step {self._trainer.saved}; the same command resumes")


@contextmanager
def evaluation_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show how many batches of each measure are done: a bar on a terminal, in a log file four lines a measure."""
    if not console.is_terminal:
        yield lambda what, done, of: _line(console, what, done, of)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=of)
            bar.update(tasks[what], completed=done)

        yield draw


def _line(console: Console, what: str, done: int, of: int) -> None:
    # rounds of several batches may step over a quarter: it is said by the first that is behind it
    if done == of or 4 * done // of > 4 * (done - 1) // of:
        console.print(f"{what}: {done} of {of} batches", highlight=False)
