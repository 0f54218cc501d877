"""Starting and ending a run of two processes under the real torchrun; what each leaves in the run's folder."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from mmoe.runtime.launch import distributed_context, same_config, strongest
from mmoe.runtime.launch_errors import name_ranks
from tests.conftest import REPOSITORY

BEGIN = """
import logging, os, signal, sys, time, warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from mmoe.commands.console import show_record
from mmoe.errors import MmoeError
from mmoe.runtime.launch import rank_zero_first, distributed_context, same_config, strongest
from mmoe.runtime.logging import set_up_logging
from mmoe.runtime.watch import StepWatchdog

folder, timeout = Path("run"), 3.0
rank = int(os.environ["RANK"])
(Path("pid") / str(os.getpid())).touch()
set_up_logging(show_record)
with distributed_context(timeout, folder) as world:
    logger = logging.getLogger("mmoe.test")
"""


class Torchrun:
    """torchrun with two processes of a script: BEGIN, then `body` inside its `with distributed_context(...)`."""

    def __init__(self, folder: Path, body: str, *options: str, ranks: int = 2):
        (folder / "pid").mkdir()
        (folder / "script.py").write_text(BEGIN + textwrap.indent(textwrap.dedent(body), "    "))
        self.folder, self.run, self.output = folder, folder / "run", ""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
        self.process = subprocess.Popen(
            [*command, "script.py"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> int:
        """The exit code; afterwards no process of the script may be left."""
        try:
            self.output = self.process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            for number in self.alive():
                os.kill(number, signal.SIGKILL)
            pytest.fail(f"torchrun did not end: {self.process.communicate()[0]}")
        assert not self.alive(), self.output
        return self.process.returncode

    def alive(self) -> list[int]:
        return [number for path in (self.folder / "pid").iterdir() if _runs(number := int(path.name))]

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def errors(self) -> dict[int, dict]:
        lines = [json.loads(line) for line in (self.run / "errors.jsonl").read_text().splitlines()]
        assert len({line["rank"] for line in lines}) == len(lines), lines
        return {line["rank"]: line for line in lines}


def _runs(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE  # ended, and nobody has asked how
    except psutil.NoSuchProcess:
        return False


def test_a_dying_rank_ends_all_and_both_say_why_in_one_file(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: None)  # as the training loop, which wants to end its step first
        logger.info("only once")
        logger.warning("a worry of rank " + str(rank))
        warnings.warn("a thing of rank " + str(rank))
        with StepWatchdog(timeout, folder) as watch:
            for step in range(1, 6):
                watch.beat(step, "forward")
                if step == 3 and rank == 1:
                    raise MmoeError("the data of rank 1 are broken")
                strongest(0)
        """,
    )
    assert run.wait() != 0
    errors = run.errors()
    assert errors[1]["message"] == "the data of rank 1 are broken" and errors[1]["after"] is None
    assert (errors[1]["step"], errors[1]["restart"]) == (3, 0) and "script.py" in errors[1]["traceback"]
    assert errors[0]["after"] == "rank 1 failed: MmoeError: the data of rank 1 are broken" and errors[0]["step"] == 3
    assert "the data of rank 1 are broken" in run.output.split("Root Cause")[1]  # torchrun shows the cause
    assert "rank 1 failed: MmoeError: the data of rank 1 are broken; run/errors.jsonl has the errors" in run.output
    assert run.output.count("only once") == 1
    assert "a thing of rank 0" in run.output and "a thing of rank 1" not in run.output
    assert "a worry of rank 0" in run.output and "a worry of rank 1" not in run.output
    log = (run.run / "logs" / "rank-00001.log").read_text()
    assert "a thing of rank 1" in log and "WARNING mmoe.test a worry of rank 1" in log and "only once" not in log
    assert [path.name for path in (run.run / "logs").iterdir()] == ["rank-00001.log"]


def test_a_rank_that_dies_before_the_training_begins_is_the_one_that_is_blamed(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: None)
        if rank == 1:
            raise MemoryError("no room for the model")
        strongest(0)
        """,
    )
    assert run.wait() != 0
    errors = run.errors()
    assert errors[1]["after"] is None
    assert errors[0]["after"] == "rank 1 failed: MemoryError: no room for the model"


def test_different_configs_stop_every_rank_with_the_same_sentence(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        same_config("optim: {lr: 1.0}\\ndata: {length: 8}\\n")
        same_config("optim: {lr: %s}\\ndata: {length: 8}\\n" % (0.5 if rank == 1 else 1.0))
        """,
    )
    assert run.wait() != 0
    sentence = "the processes were started with different configs: optim.lr is 1.0 on rank 0 and 0.5 on rank 1; "
    errors = run.errors()
    assert sorted(errors) == [0, 1]
    assert {line["error"] for line in errors.values()} == {"ConfigError"}
    assert len({line["message"] for line in errors.values()}) == 1
    assert errors[1]["message"].startswith(sentence)


def test_torchrun_restarts_the_run_which_goes_on_where_it_was(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        folder.mkdir(exist_ok=True)
        saved = folder / "saved.txt"
        with StepWatchdog(timeout, folder) as watch:
            first = int(saved.read_text()) + 1 if saved.exists() else 1
            logger.info(f"begins at step {first}")
            for step in range(first, 6):
                watch.beat(step, "forward")
                strongest(0)
                if rank == 0:
                    saved.write_text(str(step))
                if step == 3 and first == 1:
                    strongest(0)
                    if rank == 0:
                        (folder / "hang-report.txt").write_text("of the first attempt")
                    raise RuntimeError("once")
        """,
        "--max-restarts=1",
    )
    assert run.wait() == 0, run.output
    assert "begins at step 1" in run.output and "begins at step 4" in run.output
    assert "2 processes on 1 machine, gloo, restart 1 of 1" in run.output
    assert (run.run / "saved.txt").read_text() == "5"
    assert not (run.run / "hang-report.txt").exists()
    assert [path.read_text() for path in run.run.glob("hang-report-*.txt")] == ["of the first attempt"]
    assert {line["restart"] for line in run.errors().values()} == {0}


def test_what_the_first_rank_does_alone_may_take_longer_than_a_collective(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        rank_zero_first(lambda: time.sleep(3))
        strongest(0)
        rank_zero_first(lambda: Path("missing").read_text())
        """,
    )
    assert run.wait() != 0
    errors = run.errors()
    assert errors[0]["error"] == "FileNotFoundError"
    assert errors[1]["message"] == "rank 0 failed at what it does for all ranks; see its error"


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    run = Torchrun(
        tmp_path,
        """
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        step = 0
        while not strongest(bool(asked))[0]:
            step += 1
            time.sleep(0.02)
            Path(f"started-{rank}").touch()
        Path(f"{os.getpid()}.end").write_text(f"{step} {len(asked)}")
        """,
    )
    run.wait_for("started-0"), run.wait_for("started-1")
    os.kill(run.alive()[0], signal.SIGTERM)
    assert run.wait() == 0, run.output
    ends = [path.read_text().split() for path in tmp_path.glob("*.end")]
    assert len({step for step, _ in ends}) == 1 and sorted(asked for _, asked in ends) == ["0", "1"]


def test_one_process_needs_no_group(tmp_path):
    with distributed_context(600.0, tmp_path / "run") as world:
        assert world == 1 and strongest(1, 0) == [1, 0]
        same_config("a: 1")
    with pytest.raises(ValueError), distributed_context(600.0, tmp_path / "run"):
        raise ValueError  # as it was raised, and nothing written
    assert not (tmp_path / "run").exists()


def test_ranks_are_named_by_their_runs():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"


def test_a_config_error_ends_torchrun_without_a_restart(tmp_path):
    body = """
    from mmoe.errors import ConfigError
    with open(f"attempts-{rank}", "a") as file:
        file.write("1")
    def kill(process, number, kill=os.kill):
        Path(f"sent-{rank}").touch()
        kill(process, number)
    os.kill = kill
    dist.barrier()
    raise ConfigError("parallel.ep is 3; set it to 2")
    """
    run = Torchrun(tmp_path, body, "--max-restarts=3")
    assert run.wait() != 0
    assert len(list(tmp_path.glob("sent-*"))) == 1  # a second one would break into torchrun's closing
    assert [(tmp_path / f"attempts-{rank}").read_text() for rank in (0, 1)] == ["1", "1"], run.output
    assert "parallel.ep is 3; set it to 2" in run.output


def test_a_wrong_command_ends_torchrun_without_a_restart(tmp_path):
    """Before there is a process group."""
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "mmoe", "train", "nowhere.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and 1 <= done.stderr.count("nowhere.yaml does not exist") <= 2, done.stderr
