"""A small run over random sources of every document kind, with the weights it was initialized with."""

import numpy as np
import pytest
import torch

from mmoe.config.load import validate
from mmoe.recipe.config import RunConfig
from mmoe.training.run import Run
from tests.data.synthetic import MAKERS, fit_codec, write_source

MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 32, "contrast_dim": 8}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folders of four sources (text, image, audio, clip) and a fitted codec."""
    root = tmp_path_factory.mktemp("evaluation")
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        train = [make(rng, f"{name}-{i}") for i in range(24)]
        heldout = [make(rng, f"{name}-h{i}") for i in range(10)]
        write_source(root / name, {"train": train, "heldout": heldout})
    fit_codec(root / "codec.safetensors")
    return root


@pytest.fixture(scope="session")
def build_run(prepared, tmp_path_factory):
    """Makes a run over the sources; keyword arguments change its config tree."""

    def build(names=tuple(MAKERS), **changes) -> Run:
        torch.set_num_threads(1)
        codec = fit_codec(prepared / "codec.safetensors")
        tree = {
            "data": {
                "sources": {name: {"kind": "text", "shards": str(prepared / name)} for name in names},
                "sequence_length": 160,
            },
            "tokenizers": {
                "vision": {"patch": 8, "max_patches": 12},
                "audio": codec.model_dump(mode="json"),
                "action": {"chunk": 4},
            },
            "model": MODEL,
            "losses": {"contrastive": {"group_sequences": 1}},
            "optim": {"lr": {"peak": 1e-3}},
            "training": {
                "run": str(tmp_path_factory.mktemp("run")),
                "micro_batch_sequences": 2,
                "global_batch_positions": 320,
                "budget_positions": 3200,
            },
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree[section] = {**tree[section], name: value}
        run = Run.build(validate(RunConfig, tree, "the test's config"))
        run.folder.mkdir(exist_ok=True)
        return run

    return build


@pytest.fixture(scope="session")
def run(build_run) -> Run:
    return build_run()
