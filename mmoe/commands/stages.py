"""Defines `mmoe stages`, which shows what a config's stages take from its sources."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mmoe.commands.arguments import AsJson, Overrides, config_at
from mmoe.commands.completion import complete_config
from mmoe.commands.console import Console, console, print_json

if TYPE_CHECKING:
    from mmoe.recipe.config import RunConfig

WARNING = Text("warning", "yellow")


def stages(
    config: Annotated[Path, typer.Argument(help="a YAML file", autocompletion=complete_config)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what each stage will take from each source, before anything runs: shares, positions, epochs."""
    found = config_at(config, overrides)
    if as_json:
        print_json(forecast(found))
    else:
        show_stages(found, console)


def forecast(config: "RunConfig") -> dict[str, Any]:
    """Return stages by source, in positions, with the run's steps and the warnings."""
    from mmoe.planning.data import mixture_of

    mixture = mixture_of(config.data, config.tokenizers, config.training.budget_positions)
    batch = config.batch.global_batch_positions
    return {
        "steps": config.batch.iterations,
        "global_batch_positions": batch,
        "budget_positions": config.training.budget_positions,
        "stages": [
            {
                "name": stage.name,
                "start": stage.start,
                "stop": stage.stop,
                "first_step": stage.start // batch,
                "temperature": stage.config.temperature,
                "sources": [
                    {"name": source.name, **asdict(plan)}
                    for source, plan in zip(mixture.sources, mixture.expected(stage), strict=True)
                ],
            }
            for stage in mixture.stages
        ],
        "warnings": mixture.warnings(),
    }


def show_stages(config: "RunConfig", console: Console) -> None:
    """Print positions, share and epochs of every source in every stage; then the warnings."""
    import numpy as np

    from mmoe.planning.data import mixture_of

    mixture = mixture_of(config.data, config.tokenizers, config.training.budget_positions)
    table = Table("stage", "positions", "T", "source", "share", "its positions", "epochs", title_justify="left")
    for column in (1, 2, 4, 5, 6):
        table.columns[column].justify = "right"
    table.columns[3].overflow = "fold"
    end = config.training.budget_positions
    for stage in mixture.stages:
        temperature = stage.config.temperature
        head = [
            stage.name,
            f"{si(stage.start)} .. {si(stage.stop)}",
            "weights" if temperature is None else " to ".join(f"{t:g}" for t in np.atleast_1d(temperature)),
        ]
        for source, plan in zip(mixture.sources, mixture.expected(stage), strict=True):
            if plan.share:
                table.add_row(*head, source.name, f"{plan.share:.2%}", si(plan.positions), f"{plan.epochs:.2f}")
                head = ["", "", ""]
        table.add_section()
    console.print(table)
    steps = ", ".join(f"{s.name} from step {s.start // config.batch.global_batch_positions:,}" for s in mixture.stages)
    console.print(f"{config.batch.iterations:,} steps of {config.batch.global_batch_positions:,} positions: {steps}")
    for stage in mixture.stages:
        if stage.start >= end:
            console.print(
                WARNING,
                f"stage {stage.name} begins at {si(stage.start)}, after the run's end {si(end)}",
            )
    for sentence in mixture.warnings():
        console.print(WARNING, sentence, soft_wrap=True)


def si(number: float) -> str:
    """Format a count with a thousand's letter, e.g. 2.5T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
