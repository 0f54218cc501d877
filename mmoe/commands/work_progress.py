"""Shows how far a preparation or an evaluation is: bars on a terminal, lines at regular intervals in a log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial

from rich import progress as bars

from mmoe.commands.console import Console, printable

LINE_SECONDS = 10.0  # between two lines


class ProgressLines:
    """Says how far a work is: a line every `LINE_SECONDS`, whether or not a part has ended, and a last one."""

    def __init__(self, console: Console, what: str, unit: str, total: int | None, done: int = 0) -> None:
        self._console, self._what, self._unit, self._total = console, what, unit, total
        self._begun, self._done = done, done
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def tell(self, done: int) -> None:
        """Take note that `done` of all are done."""
        self._done = done

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._print()

    def _repeat(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            self._print()

    def _print(self) -> None:
        done, total, seconds = self._done, self._total, time.monotonic() - self._started
        pace = (done - self._begun) / max(seconds, 1e-9)
        said = [
            f"{self._what}: {done:,}" + (f" of {total:,}" if total is not None else "") + f" {self._unit}",
            f"{pace:,.{0 if pace >= 10 else 2}f} {self._unit}/s",
            f"{timedelta(seconds=round(seconds))} so far",
        ]
        if total is not None and pace and done < total:
            said.append(f"{timedelta(seconds=round((total - done) / pace))} left")
        self._console.print("  ".join(said), highlight=False, soft_wrap=True)


@contextmanager
def work_progress(console: Console, what: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a work on items, of which `done` are done; what this gives is told of every further ones."""
    if not console.is_terminal:
        with ProgressLines(console, what, "items", total, done) as lines:
            yield _adding(done, lines.tell)
        return
    with bars.Progress(*_columns(), console=console) as bar:
        task = bar.add_task(printable(what), total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _adding(done: int, tell: Callable[[int], None]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        nonlocal done
        done += count
        tell(done)

    return advance


@contextmanager
def evaluation_progress(console: Console, drawn: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show how many batches of each measure are done: bars where they are `drawn`, else `ProgressLines`."""
    with ExitStack() as stack:
        shown: dict[str, Callable[[int], None]] = {}
        bar = stack.enter_context(bars.Progress(*_columns(), console=console)) if drawn else None

        def draw(what: str, done: int, of: int) -> None:
            if what not in shown:
                if bar is not None:
                    shown[what] = partial(_move, bar, bar.add_task(printable(what), total=of))
                else:
                    stack.pop_all().close()  # of the measure before
                    shown[what] = stack.enter_context(ProgressLines(console, what, "batches", of)).tell
            shown[what](done)

        yield draw


def _move(bar: bars.Progress, task: bars.TaskID, done: int) -> None:
    bar.update(task, completed=done)


def _columns() -> tuple[bars.ProgressColumn, ...]:
    return (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
