"""Defines `mmoe init`, which writes a recipe for recordings of one's own."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mmoe.commands.arguments import AUTO, Extending
from mmoe.commands.completion import complete_kind_or_auto
from mmoe.commands.console import console
from mmoe.errors import ConfigError


def init(
    kind: Annotated[
        str,
        typer.Argument(
            help="reader, as in prepare; auto: the one that takes what INPUT holds",
            autocompletion=complete_kind_or_auto,
        ),
    ],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="file or folder of raw recordings; - for a simulation")
    ],
    options: Annotated[list[str] | None, typer.Argument(help="reader options, e.g. recordings=100")] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write; default: INPUT's name, here")] = None,
    extensions: Extending = None,
) -> None:
    """Look at raw recordings and write a small recipe for them, which `mmoe train` prepares and trains."""
    from mmoe.config.extensions import import_extensions
    from mmoe.config.load import load, parse_overrides
    from mmoe.files import write_atomically, writes
    from mmoe.planning.first_recipe import first_recipe, recipe_name
    from mmoe.preparation.sources import SOURCES
    from mmoe.preparation.survey import detect, survey
    from mmoe.recipe.config import RunConfig

    modules = import_extensions(extensions or ())
    if kind == AUTO and options:
        raise ConfigError(f"options {' '.join(options)} are a reader's; name its kind in place of {AUTO}")
    found = detect(source) if kind == AUTO else survey(kind, source, parse_overrides(options or []))
    generated = SOURCES.find(found.kind).generated
    out = Path(f"{recipe_name(found.kind if generated else source)}.yaml") if out is None else out
    name = recipe_name(out.name)
    for made in (out, Path("out", name), Path("runs", name)):
        if made.exists():
            raise ConfigError(
                f"{made} exists already, and init writes over nothing; name another recipe by --out, whose folders are "
                "called as it is, or move that away"
            )
    text = first_recipe(name, found.kind, None if generated else source, found.options, found.items, found.samples)
    if modules:
        text = f"extensions: [{', '.join(modules)}]\n{text}"
    with writes(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    load(RunConfig, out)
    console.print(
        f"{source}: {found.items:,} samples of kind {found.kind} in {found.recordings:,} recordings", soft_wrap=True
    )
    for reason, count in found.refused.most_common():
        console.print(f"  refused: {count:,}, {reason}", soft_wrap=True)
    if found.example:
        console.print(f"  the first: {found.example}", soft_wrap=True)
    commands = [["train", str(out)], ["evaluate", f"runs/{name}"]]
    if found.nothing_heldout:
        del commands[1:]
        console.print(
            "  nothing is held out, so nothing will be evaluated: that takes a second recording, or a longer one; with "
            f"it set data.sources.{name}.options.prepare.heldout_share",
            soft_wrap=True,
        )
    console.print(f"wrote {out}; now look into it, then:", soft_wrap=True)
    for command in commands:
        console.print(f"  mmoe {shlex.join(command)}", soft_wrap=True, highlight=False)
