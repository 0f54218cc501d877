"""What a user is told, and by which code a command ends, when a signal comes: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

MODULE = """
import os, signal
from typing import Literal

from mmoe.recipe.callbacks import CALLBACKS, CallbackConfig
from mmoe.training.callback import Callback


@CALLBACKS.register("stop")
class StopConfig(CallbackConfig):
    kind: Literal["stop"] = "stop"

    def build(self):
        return Stop()


class Stop(Callback):
    name = "stop"

    def on_step(self, result):
        if name := os.environ.pop("SIGNAL", ""):  # once: the second one kills
            os.kill(os.getpid(), signal.Signals[name])
"""
CONFIG = """
extensions: [my_parts]
data:
  sources: {poem: {kind: text, input: poem.txt, shards: poem}}
  sequence_length: 128
  window_documents: 16
model: {d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, intermediate_size: 32}
losses: {contrastive: {weight: 0.0}}
optim: {lr: {peak: 3e-3}}
training:
  run: run
  micro_batch_sequences: 2
  global_batch_positions: 256
  budget_positions: 2560
  callbacks: [{kind: stop}]
evaluation: {at_end: false}
"""


def start(folder, *arguments, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mmoe", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupt")
    (folder / "poem.txt").write_text("".join(f"Line {i} of a poem about the number {i * i}.\n\n" for i in range(400)))
    (folder / "my_parts.py").write_text(MODULE)
    (folder / "poem.yaml").write_text(CONFIG)
    return folder


def test_a_training_that_a_signal_ends_is_saved_and_ends_by_the_signals_code_and_a_finished_one_by_0(root):
    for number, (name, code, last) in enumerate([("SIGINT", 130, 2), ("SIGTERM", 143, 4), ("", 0, 10)]):
        run = start(root, "train", "poem.yaml", SIGNAL=name)
        said = run.communicate(timeout=200)[0]
        assert run.returncode == code, said
        assert (f"stopping after step {last}, saved; again to kill" in said) == bool(name)
        assert (f"interrupted: saved at step {last}; the same command resumes" in said) == bool(name)
        assert (root / f"run/checkpoints/step-{last:08d}").is_dir()
        assert ("resumed" in said) == (number > 0) and "error" not in said


def test_a_preparation_that_ctrl_c_ends_says_so_and_what_is_kept(tmp_path):
    run = start(tmp_path, "prepare", "simulated_drive", "-", "out", "recordings=2000", "--workers=2")
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(".out.unfinished/chunks/*")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=100)[0]
    assert run.returncode == 130, said
    assert "stopping; what is finished is kept, and the same command goes on from there; again to kill" in said
