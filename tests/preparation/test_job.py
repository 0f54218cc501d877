"""The folder of an unfinished preparation: pinned to what it prepares, and to one process at a time."""

import pytest

from mmoe.errors import DataError
from mmoe.preparation.job import Job
from mmoe.preparation.prepare import prepare
from tests.preparation.test_prepare import TOKENIZER, run


def test_an_unfinished_preparation_of_something_else_is_not_continued(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(500)))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("mmoe.preparation.prepare._find_duplicates", lambda *_: 1 / 0)
        run("text", tmp_path / "in", tmp_path / "out", max_bytes=100)
    with pytest.raises(DataError, match="options.max_bytes was 100, is now 200.*delete that folder.*--fresh"):
        run("text", tmp_path / "in", tmp_path / "out", max_bytes=200)
    with pytest.raises(DataError, match="options.prepare.heldout_share was 0.15, is now 0.3"):
        run("text", tmp_path / "in", tmp_path / "out", max_bytes=100, prepare={"heldout_share": 0.3})
    (tmp_path / "in" / "a.txt").write_text(" ".join(f"d{i}" for i in range(500)))
    with pytest.raises(DataError, match="the input has changed"):
        run("text", tmp_path / "in", tmp_path / "out", max_bytes=100)
    more = {"fresh": True, "options": {"max_bytes": 200}}
    prepare("text", tmp_path / "in", tmp_path / "out", text_tokenizer=TOKENIZER, **more)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_two_processes_do_not_prepare_one_output(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500)
    with Job(tmp_path / "out"), pytest.raises(DataError, match="another process prepares .*out"):
        run("text", tmp_path / "a.txt", tmp_path / "out")
