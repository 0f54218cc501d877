"""Provides the consoles that mmoe prints by: all that is printed is text, never markup or a control sequence.

Names of sources, files and keys come from elsewhere. `[bold]` in one is six characters and two brackets, `:car:` no
image, and an escape sequence is shown and not obeyed. Our own styles are given as arguments or as `Text`.
"""

import json
import logging
import math
import unicodedata
from typing import Any

import rich.console
import typer
from rich.text import Text

_KEPT = "\n\t"
_SHOWN = ("Cc", "Cs")  # control characters, and halves of surrogate pairs, which no terminal can be sent
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # order of display


class Console(rich.console.Console):
    """Prints text that others wrote through `rich`, in messages, tables, titles and rules alike."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make `text` printable; every string that is printed passes here, cells of tables included."""
        return super().render_str(printable(text), **options)

    def verbatim(self, text: str) -> None:
        """Print `text` as it is, but for what `printable` escapes: nothing is wrapped, and tabs stay."""
        self.file.write(printable(text) + "\n")


def printable(text: str) -> str:
    """Write control characters, unpaired surrogates and marks that turn the direction of text as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _is_escaped(c) else c for c in text)


def _is_escaped(character: str) -> bool:
    return character not in _KEPT and (unicodedata.category(character) in _SHOWN or character in _TURNING)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


console, errors = Console(), Console(stderr=True)


def print_json(value: Any) -> None:
    """Print a value as JSON, alone and as it is; what is not finite is null, since JSON has no number for it."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_record(message: str, level: int) -> None:
    """Print what a room has said by `logging`: warnings on stderr."""
    if level >= logging.WARNING:
        errors.print(message, highlight=False, soft_wrap=True)
    else:
        console.print(message, soft_wrap=True)
