"""Defines `mmoe compare`, which sets runs beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmoe.commands.arguments import AsJson
from mmoe.commands.console import Console, console, print_json
from mmoe.errors import ConfigError

if TYPE_CHECKING:
    from mmoe.monitoring.comparison import Comparison

_NAME, _VALUE = 16, 10  # characters that the columns of names and of values have at least, where there is room
_UNITS = {"peak_memory_bytes": (2**30, "peak memory, GiB")}


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of two or more runs")],
    as_json: AsJson = False,
) -> None:
    """Set runs beside each other: config keys that differ, losses at equal steps, their ends, speed and evaluations."""
    from dataclasses import asdict

    from mmoe.monitoring.comparison import compare_runs

    if len(runs) < 2:
        raise ConfigError(f"{runs[0]} alone has nothing to be compared with; give the folders of two runs or more")
    found = compare_runs(runs)
    if as_json:
        print_json(asdict(found))
    else:
        show_comparison(found, console)


def show_comparison(found: "Comparison", console: Console) -> None:
    """Print a table whose columns are the runs by number, and what a run lacks."""
    for number, run in enumerate(found.runs, start=1):
        console.print(f"{number}: {run}", soft_wrap=True, highlight=False)
    sections = {"config": found.config, **{f"step {step}": rows for step, rows in found.steps.items()}}
    sections |= {"last record": found.end, "held out": found.evaluation}
    longest = max((len(name) + 2 for rows in sections.values() for name in rows), default=0)
    table, room = Table(), console.width - 1 - 3 * (len(found.runs) + 1)  # less borders
    first = max(_NAME, min(longest, room - _VALUE * len(found.runs)))
    table.add_column(width=first, overflow="fold")
    for number in range(1, len(found.runs) + 1):
        table.add_column(str(number), max_width=max(1, (room - first) // len(found.runs)), overflow="fold")
    for title, rows in sections.items():
        if rows:
            table.add_section()
            table.add_row(title, style="bold")
            for name, values in rows.items():
                scale, said = _UNITS.get(name, (1, name))
                table.add_row(f"  {said}", *(_cell(value, scale) for value in values))
    console.print(table)
    if not found.steps:
        console.print("no step was recorded by all of them: only the last records are compared", soft_wrap=True)
    for sentences in found.lacking.values():
        for sentence in sentences:
            console.print(sentence, soft_wrap=True, highlight=False)


def _cell(value: Any, scale: float) -> str:
    from mmoe.config.describe import inline

    if value is None:
        return "-"
    if isinstance(value, float) or (scale != 1 and isinstance(value, int)):
        return f"{value / scale:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else inline(value)
