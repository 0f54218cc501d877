"""Defines `mmoe train`: a run from its config, or from where its folder stands. `mmoe.commands.session` does it."""

from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import Overrides, config_at
from mmoe.commands.completion import complete_config
from mmoe.commands.console import console


def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="a YAML file, e.g. configs/demo.yaml, or a run's folder to resume", autocompletion=complete_config
        ),
    ],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: delete what the run's folder holds")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="end this session after that many steps in all")] = None,
    adjustments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change the rate of a run on its way, recorded; repeatable"),
    ] = None,
    from_step: Annotated[int | None, typer.Option(help="resume from the checkpoint of this step")] = None,
) -> None:
    """Train a run, or resume it where its folder already holds checkpoints. What is missing is prepared first."""
    from torch.distributed import is_torchelastic_launched

    from mmoe.commands import session
    from mmoe.runtime.interrupt import Interrupted

    interrupted = session.train(
        config_at(config, overrides),
        console,
        fresh=fresh,
        stop_after=stop_after,
        from_step=from_step,
        adjustments=adjustments or (),
    )
    if interrupted and not is_torchelastic_launched():  # which would start all processes again
        raise Interrupted(interrupted)
