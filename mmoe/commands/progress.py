"""Shows the progress of a training session: a bar, or lines in a log."""

import time
from datetime import timedelta
from typing import Any

from rich import progress as bars

from mmoe.commands.console import Console
from mmoe.monitoring.record import StepRecord
from mmoe.training.callback import Callback, EvaluationResult
from mmoe.training.loop import Trainer
from mmoe.training.step import StepResult

_NEWEST = 0.3  # weight of the newest pace in what the time left is estimated from


class Progress(Callback):
    """Shows loss, rate and time left: a bar on a terminal, in a log file a line for each record."""

    name = "progress"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: bars.Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar, where there is a terminal."""
        self._trainer, self._seen = trainer, (trainer.state.step, time.monotonic())
        self._pace: float | None = None  # seconds a step, all that lies between steps included
        if self.console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("train"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("loss {task.fields[loss]} | {task.fields[rate]} tokens/s |", markup=False),
                bars.TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            done, total = trainer.state.step, trainer.stop_at
            self._task: Any = self._bar.add_task("", total=total, completed=done, loss="-", rate="-")

    def on_step(self, result: StepResult) -> None:
        """Move the bar."""
        if self._bar:
            loss, rate = f"{float(result.losses.loss):.3f}", f"{result.useful_positions / result.seconds:,.0f}"
            self._bar.update(self._task, completed=result.step, loss=loss, rate=rate)

    def tell(self, record: StepRecord) -> None:
        """Print a line on a record, where there is no bar: the figures are those of the record."""
        if self._bar:
            return
        figures, trainer = record.scalars, self._trainer
        names = [name.removeprefix("loss_") for name in figures if name.startswith("loss_")]
        terms = ", ".join(f"{name} {figures[f'loss_{name}']:.3f}" for name in names)
        left = timedelta(seconds=round(self._per_step(record.step) * (trainer.stop_at - record.step)))
        said = [
            f"step {record.step}/{trainer.last_step}",
            f"loss {figures['loss']:.3f}" + (f" ({terms})" if len(names) > 1 else ""),
            f"lr {figures['lr']:.3g}",
            f"grad norm {figures['grad_norm']:.3g}",
            f"{figures['tokens_per_second']:,.0f} tokens/s",
            f"{figures['peak_memory_bytes'] / 2**30:.1f} GiB",
            f"{left} left",
        ]
        self.console.print("  ".join(said), highlight=False, soft_wrap=True)

    def _per_step(self, step: int) -> float:
        """Seconds of a step, smoothed: a checkpoint or an evaluation between two records moves it by its share."""
        before, now = self._seen, time.monotonic()
        newest = (now - before[1]) / max(1, step - before[0])
        self._pace = newest if self._pace is None else (1 - _NEWEST) * self._pace + _NEWEST * newest
        self._seen = step, now
        return self._pace

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Print what was measured on held-out data."""
        figures = "  ".join(f"{name} {value:.3f}" for name, value in result.scalars.items())
        self.console.print(f"step {result.step}, held out: {figures}", highlight=False, soft_wrap=True)

    def on_roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Set the bar back to where the training goes on from."""
        self.console.print(f"rolled back to step {step}", highlight=False)
        self._seen = step, time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the bar as it is, and say so where the run ends before its time."""
        trainer = self._trainer
        if self._bar:
            self._bar.stop()
        if (trainer.stopping or trainer.interrupted) and trainer.saved == trainer.state.step:
            why = "interrupted" if trainer.interrupted else "stopped"
            self.console.print(f"{why}: saved at step {trainer.saved}; the same command resumes", highlight=False)
