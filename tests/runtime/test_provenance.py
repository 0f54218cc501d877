"""What RUN/provenance.jsonl says of a session, and what it must not hold."""

import os
import platform
import socket
import subprocess
from datetime import datetime, timezone
from importlib import metadata

import pytest
import torch

from mmoe import __version__
from mmoe.runtime import provenance
from mmoe.runtime.provenance import KEYS, commit_of, read_provenance, record_provenance


def git(folder, *arguments) -> str:
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | names).stdout.strip()


def test_the_commit_is_that_of_the_files_and_a_change_of_one_makes_it_dirty(tmp_path, monkeypatch):
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (package / "notes").touch()  # which git does not know is no change of the code
    assert commit_of(package) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "a.py").write_text("2")
    assert commit_of(package)["dirty"] is True
    monkeypatch.setattr(
        provenance, "_git", lambda folder, what, *more: None if what == "status" else git(folder, what, *more)
    )
    assert commit_of(package)["dirty"] is None  # git did not say it
    monkeypatch.undo()
    installed = tmp_path / "venv"
    installed.mkdir()
    (installed / "b.py").write_text("1")
    assert commit_of(installed)["commit"] is None  # it lies in a repository that is not its own


def test_each_session_adds_a_line_and_no_line_holds_a_secret_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setattr("sys.argv", ["mmoe", "train", "a b.yaml", "x=s3://me:hunter2@store/data"])
    for session, step in enumerate((0, 40)):
        record_provenance(tmp_path, session, step, {"source text": {"kind": "text"}})
    (first, second), _ = read_provenance(tmp_path)
    assert set(first) == set(second) == KEYS
    assert (first["session"], first["step"], second["session"], second["step"]) == (0, 0, 1, 40)
    assert first["command"].startswith("mmoe train 'a b.yaml'") and first["data"] == {"source text": {"kind": "text"}}
    assert first["code"]["version"] == __version__ and torch.__version__.startswith(first["versions"]["torch"])
    assert first["versions"]["python"] == platform.python_version() and first["host"] == socket.gethostname()
    assert first["ranks"] == first["machines"] == 1
    assert 0 <= (datetime.now(timezone.utc) - datetime.fromisoformat(first["time"])).total_seconds() < 60
    assert "hunter2" not in (tmp_path / "provenance.jsonl").read_text()


@pytest.mark.parametrize(
    "damage, said", [("{", "line 2 is no record"), ("[]", "line 2 is no record"), ("{}", "line 2 has no code")]
)
def test_another_line_is_named_and_left_out(tmp_path, damage, said):
    """The last one of a killed session has no end: the line after it is whole."""
    record_provenance(tmp_path, 0, 0, {})
    with (tmp_path / "provenance.jsonl").open("a") as file:
        file.write(damage)
    record_provenance(tmp_path, 1, 40, {})
    lines, left_out = read_provenance(tmp_path)
    assert [line["session"] for line in lines] == [0, 1]
    assert len(left_out) == 1 and said in left_out[0]


def test_a_package_without_metadata_has_no_version_and_mmoe_says_its_own(tmp_path, monkeypatch):
    """As in a checkout that is on the path and installed nowhere."""

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    record_provenance(tmp_path, 0, 0, {})
    (line,), _ = read_provenance(tmp_path)
    assert line["versions"]["mmoe"] == __version__ and line["versions"]["torch"] is None
