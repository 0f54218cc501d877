"""Every layout takes the step of one process: loss, terms, counts, norms and each gradient, in both precisions."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.compare import check
from tests.distributed.pool import Pool
from tests.distributed.step import Case, norms_of_equal_gradients

TWO: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp_replicate2": {"dp_replicate": 2},
    "tp2": {"tp": 2},
    "ep2": {"ep": 2},
    "ep2 of tp2": {"ep": 2, "tp": 2},
    "cp2": {"cp": 2},
    "ep2 of cp2": {"ep": 2, "cp": 2},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "offload": {"offload": True, "ep": 2},
    "full checkpointing": {"activation_checkpointing": "full", "ep": 2},
    "selective checkpointing": {"activation_checkpointing": "selective", "ep": 2},
    "selective checkpointing tp2": {"activation_checkpointing": "selective", "tp": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp_replicate2 dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "tp4": {"tp": 4},
    "tp2 dp2": {"tp": 2},
    "ep4": {"ep": 4},
    "ep2 dp_shard2": {"ep": 2},
    "ep2 dp_replicate2": {"ep": 2, "dp_replicate": 2},
    "ep2 tp2": {"ep": 2, "tp": 2},
    "ep4 tp2": {"ep": 4, "tp": 2},
    "cp2 tp2": {"cp": 2, "tp": 2},
    "cp2 ep2": {"cp": 2, "ep": 2},
    "cp4": {"cp": 4},
}
EIGHT: dict[str, dict[str, Any]] = {
    "dp8": {},
    "dp2 cp2 tp2": {"cp": 2, "tp": 2},
    "dp2 cp2 tp2 ep4": {"cp": 2, "tp": 2, "ep": 4},
    "dp_replicate2 cp2 tp2 ep2": {"dp_replicate": 2, "cp": 2, "tp": 2, "ep": 2},
    "dp_replicate2 dp_shard4 ep4": {"dp_replicate": 2, "ep": 4},
    "tp4 dp2 ep4": {"tp": 4, "ep": 4},
}
MODES = {
    "dropless-float64": (None, "float64"),
    "capacity-float64": (1.0, "float64"),
    "dropless-float32": (None, "float32"),
    "capacity-float32": (1.0, "float32"),
}


def in_every_mode(layouts: dict[str, dict[str, Any]], quick: int) -> Any:
    """Marks a test to run for each of `layouts` in both precisions and modes, all but `quick` of these as slow."""
    slow = [[], [pytest.mark.slow]]
    numbered = enumerate(MODES.items())
    modes = [pytest.param(*mode, id=name, marks=slow[number >= quick]) for number, (name, mode) in numbered]
    each = pytest.mark.parametrize("parallel", layouts.values(), ids=layouts)
    return lambda test: pytest.mark.parametrize("capacity_factor, compute", modes)(each(test))


def check_step(pool: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None) -> None:
    """Eight sequences, micro-batches of two where there are enough, contrastive groups of one sequence."""
    case = Case(
        compute=compute,
        micro=1 if pool.world == 8 else 2,
        sequences=8,
        model={"moe": {"capacity_factor": capacity_factor}},
        losses={"contrastive": {"weight": 0.3, "group_sequences": 1}},
        parallel=parallel,
    )
    expected = check(pool, case, micro=2)
    assert expected["terms"].keys() == {"ce", "contrastive", "action", "balance_sequence", "router_z"}
    assert (expected["routing"]["drops_NMSE"].sum() > 0) == (capacity_factor is not None)
    assert expected["events"]["contrastive"][1] > 0  # compared


@in_every_mode(TWO, quick=3)
def test_two_ranks(two: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None) -> None:
    check_step(two, parallel, compute, capacity_factor)


@in_every_mode(FOUR, quick=2)
def test_four_ranks(four: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None) -> None:
    check_step(four, parallel, compute, capacity_factor)


@in_every_mode(EIGHT, quick=0)
def test_eight_ranks(eight: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None) -> None:
    check_step(eight, parallel, compute, capacity_factor)


@in_every_mode({f"zero{zero}": {"zero": zero, "ep": 2} for zero in (1, 2, 3)}, quick=2)
def test_four_micro_batches_accumulate_at_every_stage_of_zero(
    two: Pool, parallel: dict[str, Any], compute: str, capacity_factor: float | None
) -> None:
    check(two, Case(compute, sequences=8, model={"moe": {"capacity_factor": capacity_factor}}, parallel=parallel))


@pytest.mark.parametrize("parallel", [{}, {"dp_replicate": 2}, {"ep": 2}, {"tp": 2}, {"cp": 2}], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_contrastive_groups_of_any_width(two: Pool, parallel: dict[str, Any], group: int) -> None:
    """Micro-batches of one sequence: within it, across the ranks of a micro-step, across micro-batches; where ranks
    share a sequence, all but the first across micro-batches."""
    check(two, Case(losses={"contrastive": {"weight": 0.3, "group_sequences": group}}, parallel=parallel))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"cp": 2}, {"tp": 2}, {"dp_replicate": 2}], ids=str)
@pytest.mark.parametrize("group", [2, 4, 8])
def test_contrastive_groups_of_any_width_on_four(four: Pool, parallel: dict[str, Any], group: int) -> None:
    losses = {"contrastive": {"weight": 0.3, "group_sequences": group}}
    check(four, Case(sequences=8, losses=losses, parallel=parallel))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("compute", ["float64", "float32"])
def test_fewer_key_value_heads_than_tensor_ranks(four: Pool, two: Pool, compute: str, kv_heads: int) -> None:
    for pool in (two, four):
        check(pool, Case(compute, model={"n_kv_heads": kv_heads}, parallel={"tp": pool.world}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("parallel", [{"tp": 4}, {"tp": 2, "cp": 2}, {"tp": 2}, {}], ids=str)
def test_a_table_of_85_rows_tied_or_not(four: Pool, parallel: dict[str, Any], tied: bool) -> None:
    check(four, Case(spare_ids=1, model={"tie_embeddings": tied}, parallel=parallel))


@pytest.mark.parametrize("level", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"cp": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_wider_balance_losses_of_ranks_that_share_sequences(two: Pool, parallel: dict[str, Any], level: str) -> None:
    check(two, Case(micro=2, losses={"load_balance": {level: 0.05}}, parallel=parallel))


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"cp": 2}, {"zero": 1}], ids=str)
def test_a_model_without_experts(two: Pool, parallel: dict[str, Any]) -> None:
    check(two, Case(model={"moe": None}, losses={"load_balance": {"sequence": 0.0}}, parallel=parallel))


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"cp": 2}], ids=str)
def test_a_model_whose_layers_all_have_experts_without_shared_ones(two: Pool, parallel: dict[str, Any]) -> None:
    moe = {"layer_freq": 1, "n_shared_experts": 0, "score_func": "sigmoid"}
    check(two, Case(model={"moe": moe}, parallel=parallel))


@pytest.mark.parametrize("poor", ["text", "short", "nothing"])
@pytest.mark.parametrize("sequences", [(0, 3), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("parallel", [{}, {"ep": 2}, {"tp": 2}, {"cp": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_a_replica_that_lacks_what_others_have(
    two: Pool, parallel: dict[str, Any], sequences: tuple[int, int], poor: str
) -> None:
    """Without images, pairs, actions or any token; one of the two choices is all that a replica of two gets."""
    moe = {"capacity_factor": 1.0}
    check(two, Case(micro=2, model={"moe": moe}, poor=dict.fromkeys(sequences, poor), parallel=parallel))


@pytest.mark.parametrize("parallel", [{}, {"ep": 4}, {"cp": 2, "tp": 2}], ids=str)
def test_only_one_sequence_holds_anything(four: Pool, parallel: dict[str, Any]) -> None:
    check(four, Case(poor=dict.fromkeys((0, 1, 3), "nothing"), parallel=parallel))


def test_a_rank_whose_share_of_a_sequence_is_padding(two: Pool) -> None:
    check(two, Case(poor=dict.fromkeys((0, 2), "short"), parallel={"cp": 2}))


HUGE = {"dp2": {}, "dp_replicate2": {"dp_replicate": 2}, "tp2": {"tp": 2}, "ep2": {"ep": 2}, "pp2": {"pp": 2}}


@pytest.mark.parametrize("parallel", HUGE.values(), ids=HUGE)
def test_the_norm_of_huge_finite_gradients_is_finite_in_every_layout(two: Pool, parallel: dict[str, Any]) -> None:
    case = Case(compute="float32", micro=2, parallel=parallel)
    for (small, small_rows), (huge, huge_rows) in two.run(norms_of_equal_gradients, case, 2, [1.0, 1e20]):
        assert huge == pytest.approx(1e20 * small, rel=1e-5) and small > 1
        np.testing.assert_allclose(huge_rows, 1e20 * small_rows, rtol=1e-5)


def test_a_gradient_that_is_not_finite_has_no_finite_norm(two: Pool) -> None:
    case = Case(compute="float32", micro=2)
    for outcome in two.run(norms_of_equal_gradients, case, 2, [float("inf"), float("nan")]):
        assert not any(np.isfinite(norm) for norm, _ in outcome)
