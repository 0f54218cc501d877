"""torchrun starts a run again after a rank has died, and the run goes on as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmoe.config.load import dump
from tests.conftest import REPOSITORY
from tests.data.synthetic import write_sources
from tests.distributed.test_training import FIGURES, train, tree

SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from mmoe.config.load import load
from mmoe.config.tree import RunConfig
from mmoe.monitoring.memory import PeakMemory
from mmoe.monitoring.metrics import MetricsWriter
from mmoe.parallel.launch import processes
from mmoe.training.callback import Callback
from mmoe.training.run import Run
from mmoe.training.trainer import Trainer

class Dies(Callback):
    name = "dies"

    def on_step(self, trainer, result):
        marker = trainer.run.folder / "died"
        if result.step == 3 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

config = load(RunConfig, sys.argv[1])
folder = Path(config.training.run)
with processes(config.parallel, folder, Console()):
    run = Run.build(config)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(run, [MetricsWriter(PeakMemory()), Dies()], 5)
    if trainer.checkpoints.latest_step() is not None:
        trainer.resume()
    trainer.train()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("restart")
    write_sources(root)
    return root


def test_a_run_whose_rank_was_killed_resumes_by_itself_and_equals_the_uninterrupted_one(folder: Path, tmp_path: Path):
    expected = train(tree(folder, tmp_path / "one"), 5)
    many = tree(folder, tmp_path / "many", dp_shard=2, timeout_seconds=30)
    many = many.model_copy(update={"checkpoint": many.checkpoint.model_copy(update={"every_steps": 2})})
    (tmp_path / "config.yaml").write_text(dump(many))
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "script.py"), str(tmp_path / "config.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "many" / "died").exists()
    records = [json.loads(line) for line in (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()]
    last = {record["step"]: record for record in records}  # step 3 was made twice
    assert sorted(last) == [1, 2, 3, 4, 5] and len(records) >= 5
    for record in expected:
        for name in FIGURES:
            assert last[record["step"]][name] == pytest.approx(record[name], rel=1e-10)
