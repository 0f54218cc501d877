"""The same preparation in one process, in several, on Ray, and after a kill -9: byte for byte the same output."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmoe.errors import DataError
from mmoe.preparation import engines
from mmoe.preparation import prepare as prepare_module
from mmoe.preparation.engines import run
from mmoe.preparation.prepare import prepare
from mmoe.preparation.references import Reference, ReferenceSigner
from mmoe.preparation.signatures import DedupConfig
from mmoe.tokenizers.audio import MelCodec
from mmoe.tokenizers.text import TextTokenizer
from tests.data.recordings import write_jsonl

OPTIONS = {"prepare": {"shard_rows": 16, "dedup": {"near": True}, "filters": {"text": {"min_characters": 20}}}}


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_texts(folder):
    """Ten recordings of 20 texts, with short ones, equal ones and nearly equal ones among them."""
    for name in range(10):
        texts = [f"In recording {name} line {i} has {'words ' * (i % 7)}{name * 37 + i * 11}" for i in range(20)]
        texts[3] = "short"
        texts[7] = f"What every recording says, and then some more of the same, but for this number: {name}"
        write_jsonl(folder / f"r{name}.jsonl", [{"text": text} for text in texts])


def make(source, output, kind="text", options=OPTIONS, **more):
    return prepare(kind, source, output, text_tokenizer=TextTokenizer.bytes(), options=options, **more).manifest


def double(number):
    if number < 0:
        raise DataError("a negative number")
    return 2 * number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def pids_of(marker):
    """Processes whose command line or environment names the marker."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environment:
                if marker.encode() in environment.read():
                    found.add(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_every_result_and_raise_what_the_work_raises(workers):
    assert sorted(run(double, range(9), workers)) == list(range(0, 18, 2))
    with pytest.raises(DataError, match="a negative number"):
        list(run(double, [1, -1, 2], workers))


def test_a_worker_that_dies_is_reported():
    with pytest.raises(DataError, match="a worker process of the preparation died.*fewer workers"):
        list(run(die, [1, 2], 2))


def test_processes_write_what_one_process_writes(tmp_path):
    write_texts(tmp_path / "in")
    one = make(tmp_path / "in", tmp_path / "one")
    two = make(tmp_path / "in", tmp_path / "two", workers=2)
    assert one == two and files(tmp_path / "one") == files(tmp_path / "two")
    assert len(one.splits["train"].shards) > 5 and set(one.removed) == {
        "short text",
        "near duplicate of a held-out sample",
    }


def test_processes_are_started_where_the_work_is_worth_them(tmp_path, monkeypatch):
    write_texts(tmp_path / "in")
    started = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(engines, "_on_processes", lambda work, tasks, n: started.append(n) or map(work, tasks))
    make(tmp_path / "in", tmp_path / "small", workers=None)
    assert not started
    plan = prepare_module._plan
    monkeypatch.setattr(prepare_module, "_plan", lambda *given: {**plan(*given), "seconds": 41.0})
    make(tmp_path / "in", tmp_path / "large", workers=None)
    assert started[0] == 10  # 4 seconds of work for each


@pytest.mark.timeout(120)
def test_ray_writes_what_one_process_writes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    write_texts(Path("in"))
    make("in", "ray", workers=2, engine="ray")
    assert not ray.is_initialized()
    make("in", "one")
    assert files(Path("one")) == files(Path("ray"))


def test_ray_raises_what_the_work_raises(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sign = ReferenceSigner(tmp_path, DedupConfig(), TextTokenizer.bytes())
    with pytest.raises(DataError, match="gone.tar|gone.parquet"):
        list(run(sign, [Reference(0, str(tmp_path), "train", "train/gone.tar")], 1, "ray"))


def test_a_killed_preparation_leaves_no_process_and_goes_on(tmp_path):
    """kill -9 of `mmoe prepare --workers 2` while it runs; the same command then keeps the finished chunks."""

    def command(output):
        options = ["recordings=12", "slices=[1,2]", "prepare.shard_rows=1", "prepare.audio.mel.codebook_size=8"]
        return [sys.executable, "-m", "mmoe", "prepare", "simulated_drive", "-", output, *options, "--workers", "2"]

    marker = f"killed-{tmp_path.name}-{os.getpid()}"
    environment = {**os.environ, "PREPARATION": marker, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    killed = subprocess.Popen(command(tmp_path / "out"), env=environment, stdout=subprocess.DEVNULL)
    chunks = tmp_path / ".out.unfinished" / "chunks"
    deadline = time.monotonic() + 60
    while not (done := [p for p in chunks.glob("*") if not p.name.startswith(".")]):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert 0 < len(done) < 12 and not (tmp_path / "out").exists()
    while pids_of(marker):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)

    again = subprocess.run(command(tmp_path / "out"), env=environment, capture_output=True, text=True, check=True)
    kept = re.search(r"going on: (\d+) of 12 items are done", again.stdout)
    assert kept and len(done) <= int(kept[1]) <= 12
    options = {"recordings": 12, "slices": [1, 2], "prepare": {"shard_rows": 1, "audio": {"mel": {"codebook_size": 8}}}}
    make("-", tmp_path / "whole", "simulated_drive", options)
    found, expected = files(tmp_path / "out"), files(tmp_path / "whole")
    # Of the codec the content is the same; the file's header lists its metadata in any order.
    codecs = [MelCodec.load(tmp_path / name / "audio_codec.safetensors").fingerprint for name in ("out", "whole")]
    assert codecs[0] == codecs[1] and found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"audio_codec.safetensors"}
