"""The progress bar of a training session."""

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.commands.console import Console
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
