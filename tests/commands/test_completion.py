"""What a shell is told while a command is typed."""

import pytest
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.preparation.sources import SOURCES


def proposed(words: str) -> list[str]:
    env = {"_MMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return CliRunner().invoke(app, [], env=env, prog_name="mmoe").output.split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "configs/demo.yaml",
        "configs/other.yml",
        "configs/notes.md",
        "cats.txt",
        "car.yaml",
        ".hidden/a.yaml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")


@pytest.mark.parametrize("command", ["prepare ", "fit-tokenizer ", "clock-report PATH --kind "])
def test_kinds_are_proposed(command):
    assert proposed(f"mmoe {command}") == SOURCES.kinds()
    assert proposed(f"mmoe {command}zz") == [] and proposed(f"mmoe {command}le") == ["lerobot"]
    assert proposed("mmoe init a") == ["auto", "audio_text"]


@pytest.mark.parametrize("command", ["train", "config", "stages", "inspect", "estimate", "upcycle RUN"])
def test_configs_are_proposed_with_the_folders_on_the_way(here, command):
    assert proposed(f"mmoe {command} c") == ["car.yaml", "configs/"]
    assert proposed(f"mmoe {command} configs/") == ["configs/demo.yaml", "configs/other.yml"]
    assert proposed(f"mmoe {command} ") == ["car.yaml", "configs/"]
    assert proposed(f"mmoe {command} .h") == [".hidden/"] and proposed(f"mmoe {command} nowhere/x") == []


def test_commands_and_options_are_proposed_and_a_script_is_shown():
    assert proposed("mmoe com") == ["compare"] and "--stop-after" in proposed("mmoe train --")
    assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
