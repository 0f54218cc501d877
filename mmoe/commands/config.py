"""Defines `mmoe config`, which prints a config with every key and what it means."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Overrides, config_at
from mmoe.commands.completion import complete_config
from mmoe.commands.console import console


def config(
    config: Annotated[Path, typer.Argument(help="a YAML file, or the folder of a run", autocompletion=complete_config)],
    overrides: Overrides = None,
) -> None:
    """Print a config as it is resolved: every key, with its meaning and, where it differs, its default."""
    from mmoe.config.describe import described

    text = described(config_at(config, overrides))
    if console.is_terminal:
        console.print(text, end="", highlight=False, soft_wrap=True, markup=False)
    else:  # to be read again, every character as it is
        typer.echo(text, nl=False)
