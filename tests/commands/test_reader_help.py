"""The help of a command that takes a kind goes on with the options of that kind, whatever stands before it."""

import pytest
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.config.describe import options
from mmoe.config.load import parse_overrides, validate
from mmoe.errors import ConfigError
from mmoe.preparation.prepare import PrepareConfig
from mmoe.preparation.sources import SOURCES


def shown(*arguments: str) -> list[str]:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    if done.exception:
        raise done.exception
    return done.output.splitlines()


@pytest.mark.parametrize("kind", SOURCES.kinds())
def test_every_option_of_a_reader_can_be_given_as_its_help_writes_it(kind):
    reader = SOURCES.find(kind).config
    lines = [line.split()[0] for line in shown("prepare", kind, "--help") if line.startswith("  ") and "=" in line]
    own = [line for line in lines if not line.startswith("prepare.")]
    assert {option.name for option in options(reader)} == {line.partition("=")[0] for line in own}
    for option in options(reader):  # a whole config of defaults, each as it is written
        validate(reader, parse_overrides([f"{option.name}={option.default}"]), "") if option.default else None


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "video", "--help"],
        ["prepare", "--help", "video"],
        ["prepare", "--workers", "4", "--help", "video", "in", "out"],
        ["init", "video", "--help"],
        ["fit-tokenizer", "video", "--help"],
        ["clock-report", "--help", "--kind", "video"],
    ],
)
def test_the_kind_may_stand_anywhere(arguments):
    lines = shown(*arguments)
    assert "  silent_audio=keep             of audio that is silent as it is heard" in "\n".join(lines)
    assert "  prepare.heldout_share=0.15    Of recordings" in "\n".join(lines)
    assert max(map(len, lines)) <= 80 and not any("options of video" in line for line in shown("prepare", "--help"))


def test_a_word_that_is_no_kind_is_an_error_and_auto_is_the_help_of_init():
    with pytest.raises(ConfigError, match="did you mean video"):
        shown("prepare", "vidio", "--help")
    assert not any("options of" in line for line in shown("init", "auto", "--help"))


def test_every_option_of_a_reader_says_what_it_means():
    kinds = [SOURCES.find(kind) for kind in SOURCES.kinds()]
    found = [(each.kind, option) for each in kinds for option in options(each.config)]
    found += [("prepare", option) for option in options(PrepareConfig)]
    assert [(kind, option.name) for kind, option in found if not option.meaning or option.meaning[0] == "["] == []
