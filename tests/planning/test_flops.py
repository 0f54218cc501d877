"""Parameter counts and operations: of the 10B run against its published figures, of a small one against a count."""

import pytest

from mmoe.config.load import load
from mmoe.models.embeddings import ModelInputs
from mmoe.models.flops import ParameterCounts, attention_forward, model_flops
from mmoe.recipe.config import RunConfig
from tests.planning.dry_run_small import plan

MAIN = load(RunConfig, "configs/moe_10b.yaml").model
INPUTS = ModelInputs(131_072)


def test_the_main_run_has_the_parameters_of_its_recipe() -> None:
    counts = ParameterCounts.from_config(MAIN, INPUTS)
    assert counts.total == pytest.approx(9.925e9, abs=0.5e6)
    # The other two figures of the recipe leave the routers out.
    routers = MAIN.n_layers * MAIN.d_model * MAIN.moe.n_experts
    assert counts.active - routers == pytest.approx(2.525e9, abs=0.5e6)
    assert counts.multiplied - routers == pytest.approx(2.257e9, abs=0.5e6)


def test_operations_of_a_token_of_the_main_run() -> None:
    tokens = 8192
    whole = model_flops(MAIN, INPUTS, [tokens])
    attention = 3 * attention_forward(MAIN, [tokens])
    assert attention / tokens == pytest.approx(3.22e9, rel=1e-3)
    assert (whole - attention) / tokens == pytest.approx(13.54e9, rel=1e-3)


def test_attention_depends_on_the_lengths_of_documents() -> None:
    assert attention_forward(MAIN, [4096, 4096]) * 2 == attention_forward(MAIN, [8192])


WIDE = (
    "model.d_model=256 model.intermediate_size=512 model.moe.intermediate_size=512 model.n_heads=8 model.n_kv_heads=4 "
    "model.head_dim=32"
)


@pytest.mark.parametrize(
    "world, overrides",
    [
        (4, "parallel.ep=2"),
        pytest.param(4, "parallel.ep=2 parallel.activation_checkpointing=full", marks=pytest.mark.slow),
        (4, "parallel.ep=4 model.moe.capacity_factor=null parallel.activation_checkpointing=selective"),
        (4, "parallel.tp=2 parallel.ep=2"),
        pytest.param(4, "parallel.cp=2", marks=pytest.mark.slow),
        pytest.param(4, "parallel.pp=2", marks=pytest.mark.slow),
        (4, "parallel.pp=2 losses.contrastive.group_sequences=16"),
    ],
    ids=str,
)
def test_counted_operations_are_those_of_the_formula(world: int, overrides: str) -> None:
    shape = "model.n_layers=4 data.sequence_length=512 training.global_batch_positions=8192"
    step = plan(world, f"{WIDE} {shape} {overrides}")
    # What the formula leaves out is a larger share of a small model: embeddings of patches and time, the heads.
    assert step.flops(world - 1) == pytest.approx(step.cost(world - 1).flops, rel=0.08)
