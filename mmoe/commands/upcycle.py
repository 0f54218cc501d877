"""Defines `mmoe upcycle`, which makes a run with experts that begins as copies of a dense model."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Overrides, config_at
from mmoe.commands.completion import complete_config


def upcycle(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="a dense run, or a folder of dense Hugging Face weights")
    ],
    config: Annotated[
        Path, typer.Argument(help="YAML of the new run: the same model with model.moe", autocompletion=complete_config)
    ],
    overrides: Overrides = None,
    noise: Annotated[float, typer.Option(min=0, help="on the copies: its std over that of the dense matrix")] = 0.0,
    step: Annotated[int | None, typer.Option(help="checkpoint of RUN; default: the latest")] = None,
) -> None:
    """Make experts of a dense model's networks: the new run's checkpoint of step 0, and what it costs in loss."""
    from mmoe.interchange.upcycle import upcycle as write
    from mmoe.recipe.training import StartConfig

    write(config_at(config, overrides), StartConfig(weights=str(folder), step=step, noise=noise))
