"""What mmoe prints is text: markup in names is shown, and control sequences do not reach the terminal."""

import io
import re

import pytest
from rich.table import Table
from rich.text import Text

from mmoe.commands.console import Console, printable
from tests.conftest import REPOSITORY

NAMES = [
    "a[/b]c[red]",
    "[link=https://x.y]z[/link]",
    ":car:",
    "\x1b[2J\x07",
    "a\rb",
    "\u202egnp.exe",
    "\udcff",
    "[bold",
]


def printed(*objects) -> str:
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True, color_system=None).print(*objects)
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_in_messages_titles_and_tables(name):
    table = Table(name, title=name)
    table.add_row(name)
    shown = printable(name)
    assert shown in printed(f"source {name} is here") and printed(table).count(shown) == 3
    printed(table).encode()  # a half character would not get through
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", shown)


def test_ordinary_text_and_our_own_styles_are_left_alone():
    for text in ("größer, 東京 🚗", "two\nlines\tand a tab", "[1, 2]"):
        assert printable(text) == text
    assert printed(Text("error", "bold red"), "of [this]") == "error of [this]\n"


def test_what_is_printed_verbatim_is_neither_wrapped_nor_rendered():
    file = io.StringIO()
    text = "[b]bold[/b] :car: a\tb  \n" + "x y " * 100 + "größer 東京"
    Console(file=file, width=20, force_terminal=True).verbatim(f"{text}\x1b[2J\r\x00")
    assert file.getvalue() == f"{text}\\x1b[2J\\r\\x00\n"


def test_no_other_console_is_made_anywhere():
    """A console of rich itself reads markup in what it prints."""
    sources = [
        path for room in ("mmoe", "tools", "experiments", "benchmarks") for path in (REPOSITORY / room).rglob("*.py")
    ]
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for path in sources
        if re.search(r"from rich.console import .*Console|rich\.markup|from rich import print", path.read_text())
    }
    assert not found
