"""What a rank has to say is said where its files cannot be written: a full disk hides no error and ends no run."""

import logging
import os
from pathlib import Path

from mmoe.errors import DataError
from mmoe.runtime.launch_errors import record_error
from mmoe.runtime.logging import rank_log


def test_an_error_that_its_file_does_not_take_is_told_on_stderr_and_to_torchrun(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "errors.jsonl").symlink_to("/dev/full")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told"))
    record_error(tmp_path, 3, DataError("the sample is bad"))
    told = capsys.readouterr().err
    assert "errors.jsonl cannot be written (No space left on device): rank 3: the sample is bad" in told
    assert "the sample is bad" in (tmp_path / "told").read_text()


def test_a_warning_that_its_file_does_not_take_is_told_on_stderr(tmp_path: Path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-00002.log").symlink_to("/dev/full")
    with rank_log(tmp_path, 2):
        logging.getLogger("x").warning("mind the gap")
    told = capsys.readouterr().err
    assert "rank-00002.log cannot be written" in told and "mind the gap" in told and os.linesep in told
