"""Defines `mmoe report`, which writes the page of a run."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Addresses
from mmoe.commands.console import console


def report(folder: Annotated[Path, typer.Argument(metavar="RUN")], overrides: Addresses = None) -> None:
    """Write summary.json and report.html of a run from what its folder holds."""
    from mmoe.optional import needs

    with needs("drawing the report"):
        from mmoe.reporting.report import write_report
    from mmoe.training.run import RunView

    write_report(RunView.read(folder, overrides=overrides or ()))
    console.print(f"wrote {folder / 'report.html'}")
