"""A rig of seven cameras, from a recipe alone: trained on one process and on two, over a resume."""

import numpy as np
import pytest

from mmoe.config.load import validate
from mmoe.recipe.config import RunConfig
from tests.distributed.test_training import LAYOUTS, train
from tests.training.test_cameras import build
from tests.training.test_cameras import folder as folder


def tree(folder, run, **parallel) -> RunConfig:
    made = build(folder, "six", "seven").config.model_dump(mode="json")
    made["precision"]["compute"] = "float64"
    made["training"] |= {"run": str(run), "micro_batch_sequences": 1, "budget_positions": 4096}
    made["monitoring"] |= {"log_every_steps": 1, "sinks": [{"kind": "jsonl"}]}
    made["evaluation"]["at_end"] = False
    return validate(RunConfig, made | {"parallel": made["parallel"] | parallel}, "test")


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_two_processes_train_it_as_one(two, folder, tmp_path, layout):
    expected = train(tree(folder, tmp_path / "one"), 3)
    two.run(train, tree(folder, tmp_path / "many", **LAYOUTS[layout]), 2)
    records = two.run(train, tree(folder, tmp_path / "many", **LAYOUTS[layout]), 3)[0]
    for name in ("loss", "grad_norm", "loss_action"):
        np.testing.assert_allclose([r[name] for r in records], [r[name] for r in expected], rtol=1e-10)
