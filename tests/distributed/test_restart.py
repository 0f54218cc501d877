"""torchrun starts a run again after a rank was killed, and the run goes on as if nothing had happened."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mmoe.config.load import dump
from tests.conftest import REPOSITORY
from tests.data.synthetic import write_sources
from tests.distributed.test_training import FIGURES, train, tree

STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("restart")
    write_sources(root)
    return root


def records_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)] if path.exists() else []


def kill_rank(torchrun: psutil.Process, rank: int) -> None:
    for process in torchrun.children():
        if process.environ().get("RANK") == str(rank):
            process.kill()


def test_a_run_whose_rank_was_killed_resumes_by_itself_and_equals_the_uninterrupted_one(folder: Path, tmp_path: Path):
    expected = train(tree(folder, tmp_path / "one"), STEPS)
    many = tree(folder, tmp_path / "many", dp_shard=2, timeout_seconds=30)
    many = many.model_copy(update={"checkpoint": many.checkpoint.model_copy(update={"every_steps": 2})})
    (tmp_path / "config.yaml").write_text(dump(many))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "mmoe", "train", str(tmp_path / "config.yaml"), f"--stop-after={STEPS}"]
    torchrun = psutil.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while torchrun.poll() is None and not any(record["step"] == 3 for record in records_of(tmp_path / "many")):
            time.sleep(0.01)
        kill_rank(torchrun, 1)
        output = torchrun.communicate(timeout=150)[0]
    finally:
        if torchrun.is_running():
            torchrun.kill()
    assert torchrun.returncode == 0, output[-3000:]
    assert "restart 1 of 1" in output and "resumed" in output

    records = records_of(tmp_path / "many")
    last = {record["step"]: record for record in records}
    assert list(last) == [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in expected:
        for name in FIGURES:
            assert last[record["step"]][name] == pytest.approx(record[name], rel=1e-10)

    (error,) = [json.loads(line) for line in (tmp_path / "many" / "errors.jsonl").read_text().splitlines()]
    assert (error["rank"], error["restart"]) == (0, 0)
    assert error["after"].startswith("rank 1 gives no sign of life: killed")  # and rank 0, which saw it, has no blame
