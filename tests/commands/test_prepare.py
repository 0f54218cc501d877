"""What `mmoe train` finds missing is prepared by another process, whose end is this one's."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mmoe.commands import prepare
from mmoe.data.config import SourceConfig
from mmoe.errors import ConfigError, MmoeError
from mmoe.tokenizers.text import TextConfig
from tests.conftest import REPOSITORY

DRIVE = """
from mmoe.commands.prepare import prepare_missing
from mmoe.data.config import SourceConfig
from mmoe.tokenizers.text import TextConfig

if __name__ == "__main__":
    prepare_missing(
        {"drive": SourceConfig(kind="simulated_drive", shards="drive", options={"recordings": 2000})}, TextConfig()
    )
"""


def die(sender, sources, text, extensions):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(sender, sources, text, extensions):
    raise KeyError("a fault of the program")


def test_a_sentence_for_the_user_is_raised_here(tmp_path):
    source = SourceConfig(kind="text", shards=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"data.sources.s.shards: .*out does not exist.*recordings to make it from"):
        prepare.prepare_missing({"s": source}, TextConfig())


@pytest.mark.parametrize("end, sentence", [(die, "was killed, often for lack of memory"), (fail, "says why above")])
def test_a_preparation_that_ends_by_itself_is_one_sentence(monkeypatch, capfd, end, sentence):
    monkeypatch.setattr(prepare, "_prepare_missing", end)
    with pytest.raises(MmoeError, match=sentence):
        prepare.prepare_missing({}, TextConfig())
    assert ("KeyError: 'a fault of the program'" in capfd.readouterr().err) == (end is fail)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # ended, and nobody has asked how
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_no_preparation_outlives_the_training_that_waits_for_it(tmp_path, how):
    (tmp_path / "work.py").write_text(DRIVE)
    waiting = subprocess.Popen(
        [sys.executable, "work.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(".drive.unfinished/chunks*")):
        assert time.monotonic() < deadline and waiting.poll() is None
        time.sleep(0.1)
    begun = psutil.Process(waiting.pid).children(recursive=True)
    os.killpg(waiting.pid, how) if how is signal.SIGINT else waiting.kill()  # Ctrl-C goes to all of a terminal
    assert waiting.wait(150) != 0
    deadline = time.monotonic() + 60
    while any(map(lives, begun)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert begun and not any(map(lives, begun))
