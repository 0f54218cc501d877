"""A module beside a config that adds a reader, an optimizer and a callback: every command finds what it registers."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

MODULE = """
import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mmoe.optim.optimizer import OPTIMIZERS, OptimizerConfig
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Item, Source
from mmoe.config.base import Config
from mmoe.recipe.callbacks import CALLBACKS, CallbackConfig
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment
from mmoe.training.callback import Callback


class LinesConfig(Config):
    first: int = 0


def sample(key, text):
    return Sample(key, key, {"txt": text.encode()}, [Segment(Modality.TEXT, "txt", text=text)])


def items(path, config, quarantine):
    for number, line in enumerate(path.read_text().splitlines()[config.first :]):
        yield Item(f"line-{number:04d}", f"line-{number:04d}", partial(sample, f"line-{number:04d}", line))


SOURCES.register("lines")(Source("lines", "none", 0, LinesConfig, items))


@OPTIMIZERS.register("plain")
class PlainConfig(OptimizerConfig):
    kind: Literal["plain"] = "plain"

    def build(self, parameters):
        return torch.optim.SGD(list(parameters.items()))

    def state_layout(self, shape):
        return {}


@CALLBACKS.register("note")
class NoteConfig(CallbackConfig):
    path: str

    def build(self):
        return Note(self.path)


class Note(Callback):
    name = "note"

    def __init__(self, path):
        self.path = Path(path)

    def on_step(self, result):
        with self.path.open("a") as file:
            file.write(f"{result.step}\\n")
"""
CONFIG = """
extensions: [my_parts]
data:
  sources: {{poem: {{kind: lines, input: {root}/poem.txt, shards: {root}/poem, options: {{first: 3}}}}}}
  sequence_length: 128
  window_documents: 16
model: {{d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, intermediate_size: 32}}
losses: {{contrastive: {{weight: 0.0}}}}
optim: {{lr: {{peak: 3e-3}}, matrices: {{kind: plain}}}}
training:
  run: {root}/run
  micro_batch_sequences: 2
  global_batch_positions: 256
  budget_positions: 512
  callbacks: [{{kind: note, path: {root}/steps}}]
evaluation: {{at_end: false}}
"""


def mmoe(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "mmoe", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_every_command_finds_what_a_config_extends_it_by_from_any_folder(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "poem.txt").write_text("".join(f"Line {i} of a poem about {i * i}, and lines.\n" for i in range(300)))
    (home / "my_parts.py").write_text(MODULE)
    (home / "poem.yaml").write_text(CONFIG.format(root=tmp_path))
    (home / "poem.txt").rename(tmp_path / "poem.txt")
    commands = [
        ("train", home / "poem.yaml"),
        ("train", tmp_path / "run", "training.budget_positions=768"),
        ("evaluate", tmp_path / "run"),
        ("generate", tmp_path / "run", "--prompt", "Line", "--max-tokens", 2),
        ("report", tmp_path / "run"),
        ("prepare", "lines", tmp_path / "poem.txt", "again", "--extension", f"{home}/my_parts", "--workers", 2),
    ]
    for command in commands:
        done = mmoe(away, *command)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert (tmp_path / "steps").read_text().split() == ["1", "2", "3"]
    unknown = mmoe(away, "prepare", "lines", tmp_path / "poem.txt", "third")
    assert unknown.returncode == 1 and "'lines' is not a kind of source" in unknown.stderr
