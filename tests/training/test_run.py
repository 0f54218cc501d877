"""A run is read from any folder, finds its data where it was or where it is told, and prepares nothing."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.config.load import absolute, load
from mmoe.errors import MmoeError
from mmoe.recipe.config import RunConfig
from mmoe.training.run import CONFIG, Run
from tests.conftest import REPOSITORY

NAME = "a[/b]c[red]"  # of the source: nothing of it is markup
TREE = {
    "data": {
        "sources": {NAME: {"kind": "text", "input": "poem.txt", "shards": "out/poem"}},
        "sequence_length": 128,
        "window_documents": 16,
    },
    "tokenizers": {"text": {"path": "out/text.json", "vocabulary_size": 300}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 32},
    "losses": {"contrastive": {"weight": 0.0}},
    "optim": {"lr": {"peak": 3e-3}},
    "training": {
        "run": "runs/poem",
        "micro_batch_sequences": 2,
        "global_batch_positions": 256,
        "budget_positions": 512,
    },
    "monitoring": {"sinks": [{"kind": "jsonl"}, {"kind": "arrays"}]},
}


def mmoe(*arguments: str) -> str:
    """What the command prints; raises what it raises."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the data and a run of two steps, made by a config of relative addresses; and what was printed."""
    root = tmp_path_factory.mktemp("home")
    (root / "poem.txt").write_text(
        "".join(f"Line {i} of a poem about {i * i}, and about lines.\n\n" for i in range(400))
    )
    (root / "poem.yaml").write_text(yaml.safe_dump(TREE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        said = mmoe("stages", "poem.yaml", f"data.sources.{NAME}.positions=1000")
    done = subprocess.run(  # what is missing is prepared, and said, by another process
        [sys.executable, "-m", "mmoe", "train", "poem.yaml"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return root, said + done.stdout


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of that folder, whose run holds the addresses of the copy; the current folder is another, empty one."""
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(trained[0], home)
    config = home / "runs/poem" / CONFIG
    config.write_text(config.read_text().replace(str(trained[0]), str(home)))
    away.mkdir()
    monkeypatch.chdir(away)
    return home


def everything(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_a_name_full_of_markup_is_shown_in_every_table_and_page(trained, home):
    assert f"CE of text, {NAME}" in trained[1] and "preparing source a[/b]c[red] there" in trained[1]
    assert f"CE of text, {NAME}" in mmoe("evaluate", home / "runs/poem")
    assert NAME in mmoe("inspect", home / "runs/poem", "--steps", 1)
    assert NAME in (home / "runs/poem/report.html").read_text()


def test_a_run_keeps_addresses_that_hold_from_any_folder(home):
    kept = load(RunConfig, home / "runs/poem" / CONFIG)
    assert kept == absolute(kept) == absolute(load(RunConfig, home / "poem.yaml"), home)
    mmoe("evaluate", home / "runs/poem")
    assert "report.html" in mmoe("report", home / "runs/poem")
    assert mmoe("generate", home / "runs/poem", "--prompt", "Line", "--max-tokens", 4).startswith("Line")
    mmoe("export", home / "runs/poem", "--out", "hf")
    assert everything(home.parent / "away")[0].name == "hf"
    assert not (home.parent / "away" / "out").exists()


def test_the_same_relative_config_resumes_from_the_folder_it_began_in(home, monkeypatch):
    monkeypatch.chdir(home)
    assert "has its 2 steps already" in " ".join(mmoe("train", "poem.yaml", "evaluation.at_end=true").split())
    (home / "runs/poem" / CONFIG).write_text(yaml.safe_dump(TREE))  # as earlier versions wrote it
    assert "has its 2 steps already" in " ".join(mmoe("train", "poem.yaml").split())


def test_the_folder_of_a_run_is_a_config_and_resumes_it_from_anywhere(home):
    assert "has its 2 steps already" in " ".join(mmoe("train", home / "runs/poem").split())
    shutil.move(home / "runs/poem", home / "runs/moved")
    assert "runs/moved has its 2 steps already" in "".join(mmoe("train", home / "runs/moved").split("\n"))
    assert everything(home.parent / "away") == [] and not (home / "runs/poem").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate", "report", "export", "inspect"])
def test_a_command_that_reads_prepares_nothing(home, command):
    """Neither in the current folder nor where the data was."""
    shutil.rmtree(home / "out/poem")
    before = everything(home.parent)
    more = ["--out", "hf"] if command == "export" else []
    with pytest.raises(
        MmoeError, match=r"home/out/poem does not exist \(the nearest .*mmoe prepare text .*or give its"
    ):
        mmoe(command, home / "runs/poem", *more)
    assert everything(home.parent) == before


def test_moved_data_is_found_by_the_override_that_the_sentence_names(home):
    shutil.move(home / "out", home / "data")
    shutil.move(home / "runs/poem", home / "run")
    with pytest.raises(
        MmoeError, match=r"data.sources.a\[/b\]c\[red\].shards: .* data.sources.a\[/b\]c\[red\].shards=FOLDER"
    ):
        Run.load(home / "run")
    moved = [f"data.sources.{NAME}.shards={home / 'data/poem'}"]
    with pytest.raises(MmoeError, match=r"out/text.json does not exist: tokenizers.text.path"):
        Run.load(home / "run", overrides=moved)
    moved += [f"tokenizers.text.path={home / 'data/text.json'}"]
    assert f"CE of text, {NAME}" in mmoe("evaluate", home / "run", *moved)
    with pytest.raises(MmoeError, match="model.rope_theta cannot be changed of a run that is trained; only addresses"):
        Run.load(home / "run", overrides=[*moved, "model.rope_theta=5.0"])
