"""What a rank keeps by the formula is what the sharded tensors of the real model have."""

import pytest

from tests.optim import outside  # noqa: F401  # registers the kind tests.signs
from tests.planning.dry_run_small import plan


@pytest.mark.parametrize(
    "world, overrides",
    [
        (4, ""),
        (4, "parallel.dp_replicate=2 parallel.ep=2"),
        (4, "parallel.tp=2 parallel.ep=4"),
        (4, "parallel.tp=4 optim.matrices.kind=muon"),
        (4, "parallel.ep=4 optim.optimizer.implementation=foreach optim.matrices.kind=tests.signs"),
        (3, "training.global_batch_positions=1536 model.d_model=48 model.moe.intermediate_size=48"),
        (4, "parallel.pp=2 model.tie_embeddings=true"),
    ],
    ids=str,
)
def test_the_formula_is_what_is_held(world: int, overrides: str) -> None:
    step = plan(world, overrides)
    cost, closed = step.cost(world - 1), step.memory(world - 1)
    assert closed.parameters == cost.parameters
    assert cost.memory["gradients"] == closed.gradients
    assert cost.memory["optimizer"] == closed.optimizer
    # FSDP2 pads weights that the ranks cannot share evenly.
    assert closed.weights <= cost.memory["weights"] <= 1.05 * closed.weights


def test_zero_1_keeps_whole_gradients_within_a_step() -> None:
    assert plan(4, "parallel.zero=1").memory(0).whole_gradients > 0
    assert plan(4, "parallel.zero=2").memory(0).whole_gradients == 0


def test_checkpointing_and_shards_save_what_they_should() -> None:
    none, full = (plan(4, f"parallel.activation_checkpointing={kind}").cost(0).memory for kind in ("none", "full"))
    assert full["activations"] < 0.9 * none["activations"]
    assert full["weights"] == none["weights"]


def test_an_early_pipeline_stage_keeps_more_passes() -> None:
    step = plan(4, "parallel.pp=4 model.n_layers=4")
    first, last = step.cost(0), step.cost(3)
    assert (first.kept, last.kept) == (4, 1)
    assert first.micro_batches > 4
