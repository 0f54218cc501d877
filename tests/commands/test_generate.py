"""`mmoe generate` prints what the model said, and chunks of actions as columns; options that do not fit are said."""

from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.errors import ConfigError
from mmoe.evaluation.predict import PredictedChunk
from mmoe.training.run import Run

SAID, WAS = {"click": ["banana", "A"]}, {"click": ["A", "-"]}
RUN = SimpleNamespace(tokenizers=SimpleNamespace(actions={"arm": None}))


def generate(monkeypatch, *arguments, **answers):
    """What the command prints where the rooms below it give these answers; the arguments that they were given."""
    asked = []
    monkeypatch.setattr(Run, "load", lambda folder, overrides: RUN)
    for name, answer in answers.items():
        module = "generate" if name in ("generate", "speak") else "predict"

        def answered(run, *given, answer=answer, **named):
            asked.append((given, {key: value for key, value in named.items() if key != "sampling"}))
            return answer

        monkeypatch.setattr(f"mmoe.evaluation.{module}.{name}", answered)
    done = CliRunner().invoke(app, ["generate", "run", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout, asked


def test_text_comes_out_as_the_model_said_it(monkeypatch):
    said = "[b]x[/b] :car:\t" + "word " * 60 + "\x1b[31m\x07"
    printed, asked = generate(monkeypatch, "--prompt", "[link=a] ", generate=said)
    assert printed == "[link=a] " + said.replace("\x1b", "\\x1b").replace("\x07", "\\x07") + "\n"
    assert asked == [(("[link=a] ",), {"image": None, "audio": None, "max_tokens": 64})]


def test_actions_are_columns_with_the_names_of_the_dimensions(monkeypatch):
    chunk = PredictedChunk(("steering", "throttle"), 0, 50_000_000, np.array([[0.125, -1.0], [0.5, 12.0]]))
    printed, asked = generate(
        monkeypatch,
        "--source",
        "arm",
        "--image",
        "a.png",
        "--image",
        "back=b.png",
        "--state=-1,2.5",
        predict_slice=chunk,
    )
    assert [line.split() for line in printed.splitlines()] == [
        ["seconds", "step", "steering", "throttle"],
        ["0.000", "0", "0.125", "-1"],
        ["0.050", "1", "0.5", "12"],
    ]
    assert len({len(line) for line in printed.splitlines()}) == 1
    assert asked == [(("arm",), {"images": ["a.png", "back=b.png"], "state": [-1.0, 2.5], "instruction": ""})]


def test_a_clip_shows_what_was_logged_beside_it(monkeypatch):
    logged = np.array([[0.25], [np.nan]])
    chunks = [PredictedChunk(("gas",), at * 10**9, 0, np.array([[0.5], [1.5]]), SAID, logged, WAS) for at in (0, 2)]
    printed, asked = generate(monkeypatch, "--clip", "arm:ep:1", predict_clip=chunks)
    assert [line.split() for line in printed.splitlines()] == [
        ["seconds", "step", "gas", "click"],
        ["0.000", "0", "0.5", "(0.25)", "banana", "(A)"],
        ["?", "1", "1.5", "(-)", "A", "(-)"],
        ["2.000", "0", "0.5", "(0.25)", "banana", "(A)"],
        ["?", "1", "1.5", "(-)", "A", "(-)"],
    ]
    assert asked == [(("arm", "ep:1"), {})]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--state", "1,2"], "name the source whose actions to predict: --source"),
        (["--image", "a.png", "--image", "b.png"], "name the source whose actions to predict: --source"),
        (["--source", "arm", "--speak", "a.wav"], "--source takes no --speak"),
        (["--clip", "arm:x", "--source", "arm", "--prompt", "go"], "--clip takes no --source, --prompt"),
        (["--speak", "a.wav", "--image", "a.png"], "--speak takes no --image"),
        (["--clip", "arm"], "write SOURCE:KEY, the source being one of arm"),
        (
            ["--source", "arm", "--state", "1,fast"],
            "could not convert string to float: 'fast'; write numbers with commas",
        ),
    ],
)
def test_options_that_exclude_each_other_are_said(monkeypatch, arguments, said):
    with pytest.raises(ConfigError, match=said):
        generate(monkeypatch, *arguments)
