"""Defines `mmoe clock-report`, which shows what the clocks of a source say, as a table and a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mmoe.commands.arguments import Extending
from mmoe.commands.completion import complete_kind
from mmoe.commands.console import console
from mmoe.errors import ConfigError

if TYPE_CHECKING:
    from mmoe.preparation.clock_report import ClockReport


def clock_report(
    path: Annotated[str, typer.Argument(help="prepared source, or raw recordings with --kind")],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, with --kind")] = None,
    kind: Annotated[
        str | None, typer.Option(help="reader of raw recordings, as in prepare", autocompletion=complete_kind)
    ] = None,
    html: Annotated[Path, typer.Option(help="page with the histograms")] = Path("clock-report.html"),
    extensions: Extending = None,
) -> None:
    """Rates, jitter, gaps and offsets of every stream's clock, as a table and an HTML page."""
    from mmoe.config.extensions import import_extensions
    from mmoe.config.load import parse_overrides
    from mmoe.files import write_atomically, writes
    from mmoe.optional import needs
    from mmoe.preparation import clock_report as clocks

    with needs("drawing the page"):
        from mmoe.reporting.clock_page import render_clock_page

    import_extensions(extensions or ())
    if kind is None and options:
        raise ConfigError(f"options {' '.join(options)} are for a reader of raw recordings; add --kind, or drop them")
    report = (
        clocks.report_raw(kind, Path(path), parse_overrides(options or [])) if kind else clocks.report_prepared(path)
    )
    if report.kind == "synthetic":
        console.print(clocks.SYNTHETIC, style="bold")
    console.print(table_of(report))
    with writes(html):
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, render_clock_page(report))
    console.print(f"wrote {html}", soft_wrap=True)


def table_of(report: "ClockReport") -> Table:
    """Make a table of the report for a terminal, with a block of lines a stream: streams across would be too wide."""
    from mmoe.preparation.clock_report import COLUMNS, report_rows

    result = Table(title=f"clocks of {report.title}", title_justify="left", show_header=False)
    result.add_column("")
    result.add_column("")
    for line in report_rows(report):
        for column, value in zip(COLUMNS, line):
            if value:
                result.add_row(column, value, style="bold" if column == "stream" else "")
        result.add_section()
    for reason, count in sorted(report.unreadable.items()):
        result.add_row(f"refused: {reason}", f"{count:,}")
    return result
