"""The progress bars of a training session and of an evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.commands.console import Console, printable
from mmoe.training.callback import Callback
from mmoe.training.trainer import StepResult, Trainer


class ProgressBar(Callback):
    """Loss, rate and time left; on a terminal it is redrawn in place, in a log file a line every tenth of the run."""

    name = "progress"

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar, where there is a terminal."""
        self._bar: Progress | None = None
        self._line_every = max(1, trainer.last_step // 10)
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
            self._task: Any = self._bar.add_task("", total=trainer.stop_at, completed=trainer.step, loss="-", rate="-")

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Move the bar, or print a line every tenth of the run."""
        loss, rate = f"{float(result.losses.total):.3f}", f"{result.positions / result.seconds:,.0f}"
        if self._bar:
            self._bar.update(self._task, completed=result.step, loss=loss, rate=rate)
        elif result.step % self._line_every == 0 or result.step == trainer.stop_at:
            left = (trainer.stop_at - result.step) * result.seconds
            self.console.print(
                f"step {result.step}/{trainer.last_step}  loss {loss}  {rate} tokens/s  {left:.0f} s left",
                highlight=False,
            )

    def on_end(self, trainer: Trainer) -> None:
        """Leave the bar as it is, and say so where the run was interrupted."""
        if self._bar:
            self._bar.stop()
        if trainer.interrupted:
            self.console.print(f"interrupted: saved at step {trainer.step}; the same command resumes")


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
