"""One training at a time in a run's folder: a second one is refused by name, and nothing dead is in the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmoe.errors import ConfigError, OutputError
from mmoe.training import lock
from mmoe.training.lock import run_lock
from tests.conftest import REPOSITORY

HOLDER = """
import os, sys, time
from pathlib import Path
from mmoe.training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork()  # as a decoding process
    if not child:
        time.sleep(600)
    print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """(process that holds the lock of tmp_path/run, pid of its forked child); both are killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_training_is_refused_by_host_and_process_and_a_killed_one_is_not_in_the_way(tmp_path, holder):
    process, child = holder
    sentence = f"run is being trained by process {process.pid} on {os.uname().nodename} since .*training.run"
    with pytest.raises(ConfigError, match=sentence), run_lock(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == process.pid
    process.kill()
    process.wait()
    os.kill(child, 0)  # a child outlives it, and does not hold what it held
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_it_leaves_nothing_behind_and_two_in_one_process_exclude_each_other(tmp_path):
    run = tmp_path / "a" / "run"
    with run_lock(run):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} "), run_lock(run):
            pass
        assert (run / "lock").is_file()
    assert not run.exists()
    with run_lock(run):
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def left_by(path: Path, **changes) -> None:
    path.mkdir(exist_ok=True)
    content = {"host": "node17", "pid": 4711, "since": "2026-01-01T00:00:00+00:00", "boot": "another"} | changes
    (path / "lock").write_text(json.dumps(content))


def test_one_of_another_machine_that_still_beats_is_refused_and_one_that_is_silent_is_taken(
    tmp_path, monkeypatch, caplog
):
    """No lock of the kernel reaches it: only the file's time does."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.6)
    left_by(tmp_path)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "lock is of process 4711 on node17: waiting 1 s to see whether it still trains" in caplog.text
    left_by(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 4711 on node17.*delete .*lock"), run_lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 4711


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with run_lock(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        deadline = time.monotonic() + 30
        while (tmp_path / "lock").stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "lock").stat().st_mtime != 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\x00" * 100])
def test_a_lock_file_of_any_content_that_nobody_holds_is_taken(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.1)
    (tmp_path / "lock").write_text(content)
    with run_lock(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/run cannot be written .Not a directory.*writable"):
        with run_lock(tmp_path / "file" / "run"):
            pass
