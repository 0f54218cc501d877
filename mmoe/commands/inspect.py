"""Defines `mmoe inspect`, which shows what is in the first steps of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mmoe.commands.arguments import AsJson, Overrides, config_at
from mmoe.commands.completion import complete_config
from mmoe.commands.console import Console, console, print_json

if TYPE_CHECKING:
    from mmoe.planning.data import Inspection

_WORK = ("attention", "vision")  # whose balance is told


def inspect(
    config: Annotated[Path, typer.Argument(help="a YAML file, its sources prepared", autocompletion=complete_config)],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps to plan")] = 20,
    replicas: Annotated[int, typer.Option(min=1, help="data replicas to deal to")] = 1,
    as_json: AsJson = False,
) -> None:
    """Plan a run's first steps without decoding: shares, packing efficiency, what is lost, balance of work."""
    from mmoe.planning.data import inspect as plan

    found = plan(config_at(config, overrides), steps, replicas)
    if as_json:
        balance = dict(zip(_WORK, found.balance, strict=True))
        print_json(asdict(found) | {"steps": steps, "replicas": replicas, "balance": balance})
    else:
        show_inspection(found, replicas, console)


def show_inspection(found: "Inspection", replicas: int, console: Console) -> None:
    """Print a line a source, then the packing efficiency, the balance of work and what was lost."""
    table = Table("source", "share", "planned", "document parts", "positions", "epochs", title_justify="left")
    for column in range(1, 6):
        table.columns[column].justify = "right"
    for source in found.sources:
        table.add_row(
            source.name,
            f"{source.share:.2%}",
            f"{source.target:.2%}",
            f"{source.parts:,}",
            f"{source.positions:,}",
            f"{source.epochs:.2f}",
        )
    console.print(table)
    efficiency, sequences = found.packing_efficiency, found.sequences
    console.print(f"packing efficiency {efficiency:.4f} of {sequences:,} sequences of {found.length:,} positions")
    if replicas > 1:
        for work, ratio in zip(_WORK, found.balance, strict=True):
            console.print(f"{work} work of the busiest of {replicas} replicas: {ratio:.3f} times the mean")
    lost = found.lost
    console.print("nothing was cut or dropped" if not lost else "cut or dropped, up to the end of the last window:")
    for reason, number in lost.items():
        console.print(f"  {reason}: {number:,}")
