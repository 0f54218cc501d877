"""Declares the arguments that several commands take: a run or a config, with overrides."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmoe.commands.console import errors
from mmoe.runtime.logging import set_up_logging

if TYPE_CHECKING:
    from mmoe.recipe.config import RunConfig

Overrides = Annotated[list[str] | None, typer.Argument(help="dotted overrides, e.g. optim.lr.peak=1e-3")]
Measured = Annotated[
    list[str] | None,
    typer.Argument(
        help="moved data, another layout, how much, e.g. data.sources.drive.shards=/new/place parallel.ep=2"
    ),
]
Addresses = Annotated[list[str] | None, typer.Argument(help="moved data, e.g. data.sources.drive.shards=/new/place")]

AUTO = "auto"  # in place of a kind

Extending = Annotated[
    list[str] | None,
    typer.Option("--extension", metavar="MODULE", help="module that registers a reader or a modality; repeatable"),
]


def _messages_aside(asked: bool) -> bool:
    if asked:  # what the rooms say goes to stderr, so that stdout is the JSON alone
        set_up_logging(lambda message, level: errors.print(message, highlight=False, soft_wrap=True))
    return asked


AsJson = Annotated[
    bool,
    typer.Option("--json", callback=_messages_aside, help="print JSON and nothing else, for a program to read"),
]


def config_at(path: Path, overrides: list[str] | None) -> "RunConfig":
    """Read the config in a YAML file, or that of the run whose folder is given, and apply the overrides."""
    from mmoe.config.load import load, override
    from mmoe.recipe.config import RunConfig
    from mmoe.training.run import is_run, read_config

    return override(read_config(path), overrides or []) if is_run(path) else load(RunConfig, path, overrides)
