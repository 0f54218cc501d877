"""A pipeline takes the step of one process: stages, schedules, both copies of a tied table, every other axis inside."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.compare import TOLERANCE, check, differences
from tests.distributed.pool import Pool
from tests.distributed.step import Case, run_step
from tests.distributed.test_layouts import in_every_mode
from tests.distributed.test_steps import check_weights

INTERLEAVED = {"schedule": "interleaved_1f1b", "stages_per_rank": 2}
LOSSES: dict[str, Any] = {
    "contrastive": {"weight": 0.3, "group_sequences": 1},
    "load_balance": {"sequence": 0.05, "micro_batch": 0.02},
}
SCHEDULES = {"1f1b": {"pp": 2}, "interleaved": {"pp": 2, **INTERLEAVED}}
FOUR: dict[str, dict[str, Any]] = {
    "pp4": {"pp": 4},
    "dp2": {"pp": 2},
    "dp_replicate2": {"pp": 2, "dp_replicate": 2},
    "ep2": {"pp": 2, "ep": 2},
    "tp2": {"pp": 2, "tp": 2},
    "cp2": {"pp": 2, "cp": 2},
    "tp2 ep2 interleaved": {"pp": 2, "tp": 2, "ep": 2, **INTERLEAVED},
    "cp2 interleaved": {"pp": 2, "cp": 2, **INTERLEAVED},
    "dp2 offload": {"pp": 2, "offload": True},
    "dp2 full checkpointing": {"pp": 2, "activation_checkpointing": "full"},
    "ep2 selective checkpointing interleaved": {
        "pp": 2, "ep": 2, "activation_checkpointing": "selective", **INTERLEAVED
    },
}  # fmt: skip


def case_of(parallel: dict[str, Any], **changes: Any) -> Case:
    """Four layers, experts in every second one; eight sequences of four micro-batches a replica at least."""
    chosen = {"sequences": 8, "model": {}, "losses": LOSSES, **changes}
    return Case(**chosen | {"model": {"n_layers": 4, **chosen["model"]}, "parallel": parallel})


@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
def test_two_ranks(two: Pool, parallel: dict[str, Any], tied: bool, compute: str) -> None:
    expected = check(two, case_of(parallel, compute=compute, model={"tie_embeddings": tied}))
    names = {"ce", "contrastive", "action", "balance_sequence", "balance_micro_batch", "router_z"}
    assert expected["terms"].keys() == names
    assert expected["events"]["contrastive"][1] > 0  # compared


@pytest.mark.parametrize("parallel", FOUR.values(), ids=FOUR)
def test_four_ranks(four: Pool, parallel: dict[str, Any]) -> None:
    check(four, case_of(parallel))


@pytest.mark.parametrize("parallel", [{"pp": 2, "ep": 2, **INTERLEAVED}, {"pp": 2, "tp": 2}], ids=str)
def test_four_ranks_in_float32(four: Pool, parallel: dict[str, Any]) -> None:
    check(four, case_of(parallel, compute="float32"))


def check_drops(pool: Pool, parallel: dict[str, Any], compute: str) -> None:
    """Experts in every layer: each stage, and of several on a rank each one, drops choices of its own."""
    expected = check(pool, case_of(parallel, compute=compute, model={"moe": {"layer_freq": 1, "capacity_factor": 1.0}}))
    assert (expected["routing"]["drops_NMSE"].sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("compute", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
def test_dropped_choices(two: Pool, parallel: dict[str, Any], compute: str) -> None:
    check_drops(two, parallel, compute)


@pytest.mark.parametrize("compute", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", [FOUR["ep2"], FOUR["tp2 ep2 interleaved"]], ids=str)
def test_dropped_choices_on_four_ranks(four: Pool, parallel: dict[str, Any], compute: str) -> None:
    check_drops(four, parallel, compute)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize("parallel", [{"ep": 4}, {"ep": 2, "dp_replicate": 2, **INTERLEAVED}], ids=str)
def test_dropped_choices_on_eight_ranks(eight: Pool, parallel: dict[str, Any], compute: str) -> None:
    check_drops(eight, {"pp": 2, **parallel}, compute)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize("parallel", [{"pp": 2, "ep": 2, "dp_replicate": 2}, {"pp": 2, "tp": 2, "ep": 2}], ids=str)
def test_eight_ranks(eight: Pool, parallel: dict[str, Any], compute: str) -> None:
    check(eight, case_of(parallel, compute=compute))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharded_heads_of_fewer_micro_batches_than_stages(eight: Pool, zero: int) -> None:
    """The last stage's heads are needed again after its first backward pass: all forward passes come before it."""
    check(eight, case_of({"pp": 4, "zero": zero}, sequences=6))


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@in_every_mode(SCHEDULES, quick=1)
def test_four_micro_batches_accumulate_at_every_stage_of_zero(
    four: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None, zero: int
) -> None:
    model = {"moe": {"capacity_factor": capacity_factor}}
    check(four, case_of({**parallel, "zero": zero, "ep": 2}, compute=compute, model=model))


@pytest.mark.parametrize("parallel", [*SCHEDULES.values(), {"pp": 4}], ids=str)
@pytest.mark.parametrize("micro_batches", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
def test_fewer_micro_batches_than_stages(two: Pool, four: Pool, parallel: dict[str, Any], micro_batches: int) -> None:
    pool = four if parallel["pp"] == 4 else two
    check(pool, case_of(parallel, sequences=2 * micro_batches, micro=2))


@pytest.mark.slow
@pytest.mark.parametrize("moe", [{"layer_freq": 1}, {"layer_freq": 3}, {"layer_freq": 4}, None], ids=str)
@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
def test_layers_of_experts_anywhere(two: Pool, parallel: dict[str, Any], moe: dict[str, int] | None) -> None:
    """On all stages, on one in the middle or at the end, on none; statistics and loads have the whole model's rows."""
    check(two, case_of(parallel, model={"moe": moe}))


GLOBAL_BATCH = {**LOSSES, "load_balance": {"global_batch": 0.1}}


@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
def test_balance_over_the_global_batch(two: Pool, parallel: dict[str, Any]) -> None:
    """Each stage knows the loads of its layers over the micro-batches so far, as one process does."""
    check(two, case_of(parallel, losses=GLOBAL_BATCH))


def test_balance_over_the_global_batch_of_several_replicas(two: Pool, four: Pool) -> None:
    """With micro-batches of two replicas, as without a pipeline."""
    case = case_of({"pp": 2}, losses=GLOBAL_BATCH)
    expected = two.run(run_step, replace(case, parallel={}), 2)[0]
    outcome = four.run(run_step, case, 4)[0]
    assert not (found := differences("step", outcome, expected, TOLERANCE[case.compute])), "\n".join(found)


@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("group", [2, 4])
def test_contrastive_groups_wider_than_a_micro_step(two: Pool, parallel: dict[str, Any], group: int) -> None:
    """Two passes: the first one goes forward only, and only the last stage has embeddings."""
    check(two, case_of(parallel, sequences=4, losses={"contrastive": {"weight": 0.3, "group_sequences": group}}))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"pp": 2}, {"pp": 2, "cp": 2, **INTERLEAVED}], ids=str)
def test_wide_contrastive_groups_on_four(four: Pool, parallel: dict[str, Any]) -> None:
    check(four, case_of(parallel, sequences=4, losses={"contrastive": {"weight": 0.3, "group_sequences": 4}}))


@pytest.mark.parametrize("parallel", SCHEDULES.values(), ids=SCHEDULES)
def test_five_optimizer_steps(two: Pool, parallel: dict[str, Any]) -> None:
    """With the bias rule; both copies of the tied table move alike, bit by bit (`Worker.of_all_stages`)."""
    moe = {"capacity_factor": 1.0, "bias_update_rate": 0.01}
    check_weights(two, Case(model={"n_layers": 4, "moe": moe}, parallel=parallel), True)


def test_a_stage_without_experts_has_no_bias_to_move(two: Pool) -> None:
    moe = {"layer_freq": 1, "first_k_dense": 1, "bias_update_rate": 0.01}
    check_weights(two, Case(model={"moe": moe}, parallel={"pp": 2}), False)
