"""Adds the options of a kind to the help of the commands that take one: `mmoe prepare KIND --help`."""

import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from mmoe.commands.arguments import AUTO
from mmoe.commands.console import Console, console

if TYPE_CHECKING:
    from mmoe.config.describe import Option

_GIVEN = "mmoe.given"  # where the arguments are kept: the help is asked for before they are looked at
_COLUMN = 32  # where meanings begin, unless the option is longer


class ReaderCommand(TyperCommand):
    """Is a command with a `kind` among its arguments, whose help goes on with the options of that kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments as any command does; what they say is kept for the help."""
        with suppress(Exception):  # what cannot be parsed is told by the second parsing
            ctx.meta[_GIVEN] = self.make_parser(ctx).parse_args(args=list(args))[0]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and what the reader takes. Raises ConfigError where the kind is none."""
        super().format_help(ctx, formatter)
        given = ctx.meta.get(_GIVEN, {})
        if isinstance(given.get("kind"), str) and given["kind"] != AUTO:
            show_options(given["kind"], given.get("extensions") or (), console)


def show_options(kind: str, extensions: Sequence[str], console: Console) -> None:
    """Print the options of a reader, and those that every kind takes, with default and meaning."""
    from mmoe.config.describe import options
    from mmoe.config.extensions import import_extensions
    from mmoe.preparation.prepare import PrepareConfig
    from mmoe.preparation.sources import SOURCES

    import_extensions(extensions)
    reader = SOURCES.find(kind).config
    for title, found in ((kind, options(reader)), ("every kind", options(PrepareConfig, "prepare."))):
        console.print(f"options of {title}, with their defaults:", style="bold")
        for line in _lines(found, console.width):
            console.print(line, soft_wrap=True, highlight=False)


def _lines(found: "Iterable[Option]", width: int) -> Iterable[str]:
    for option in found:
        given = f"  {option.name}=" + ("..." if option.default is None else option.default)
        said = option.meaning + (" (must be given)" if option.default is None else "")
        first, *rest = textwrap.wrap(said, max(20, width - _COLUMN)) or [""]
        if len(given) < _COLUMN:
            yield f"{given:<{_COLUMN}}{first}".rstrip()
        else:
            yield given
            rest = [first, *rest]
        yield from (" " * _COLUMN + line for line in rest)
