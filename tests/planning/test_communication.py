"""The bytes of the formula are those that a step's collectives are counted to have, in every layout."""

import pytest

from mmoe.parallel.mesh import ParallelDims
from mmoe.planning.communication_traffic import Traffic, TrafficKind, share_sent, traffic_axis
from tests.planning.dry_run_small import plan

WIDER = "losses.contrastive.group_sequences=16"  # than a micro-step: two forward passes
QUICK = [
    (4, 3, "parallel.dp_replicate=2 parallel.ep=2 parallel.activation_checkpointing=full"),
    (4, 0, "parallel.ep=2 losses.contrastive.group_sequences=2 losses.load_balance.global_batch=0.1"),
    (8, 7, "parallel.cp=2 parallel.tp=2 parallel.ep=4 model.moe.capacity_factor=null"),
    (4, 3, "parallel.pp=2 parallel.zero=1"),
]
SLOW = [
    (4, 0, f"{WIDER} losses.contrastive.weight=0"),
    (4, 0, f"{WIDER} parallel.zero=2"),
    (4, 0, f"{WIDER} parallel.tp=2"),
    (4, 1, f"{WIDER} parallel.cp=2 parallel.ep=4 model.moe.capacity_factor=null"),
    (8, 4, f"{WIDER} parallel.pp=4 model.n_layers=8 model.moe.layer_freq=1"),
    (8, 4, f"{WIDER} parallel.pp=4 parallel.zero=1 model.n_layers=8 model.moe.layer_freq=1"),
    (4, 0, ""),
    (4, 0, "parallel.zero=2"),
    (4, 3, "parallel.zero=1"),
    (4, 0, "parallel.dp_replicate=2"),
    (4, 0, "parallel.ep=4 model.moe.capacity_factor=null"),
    (4, 0, "parallel.ep=2 precision.compute=float32"),
    (4, 3, "parallel.tp=4"),
    (4, 3, "parallel.tp=2 parallel.ep=2 parallel.activation_checkpointing=selective"),
    (4, 0, "parallel.tp=2 model.moe=null parallel.activation_checkpointing=full"),
    (4, 2, "parallel.cp=2 parallel.ep=2"),
    (8, 7, "parallel.cp=2 parallel.tp=2 parallel.ep=4 parallel.activation_checkpointing=full"),
    (4, 0, "parallel.pp=2 parallel.ep=2"),
    (4, 0, "parallel.pp=2 parallel.tp=2 model.tie_embeddings=true"),
    (4, 3, "parallel.pp=2 parallel.tp=2 model.tie_embeddings=true"),
    (4, 0, "parallel.pp=4 model.n_layers=4 training.global_batch_positions=256"),
    (2, 1, "parallel.pp=2 parallel.stages_per_rank=2 parallel.schedule=interleaved_1f1b model.n_layers=4"),
]


@pytest.mark.parametrize(
    "world, rank, overrides", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_dry_step_has_the_traffic_of_the_formula(world: int, rank: int, overrides: str) -> None:
    step = plan(world, overrides)
    counted, formula = step.cost(rank).traffic, step.traffic(rank)
    assert sorted(counted.rows()) == sorted(formula.rows())
    assert counted.bytes


def test_imbalance_travels_in_a_variable_exchange_only() -> None:
    dropless = "parallel.ep=2 model.moe.capacity_factor=null"
    even, uneven = (plan(4, dropless, imbalance) for imbalance in (1.0, 1.5))
    kind = TrafficKind("ep", "all_to_all")
    assert uneven.cost(0).traffic.bytes[kind] > 1.1 * even.cost(0).traffic.bytes[kind]
    assert uneven.cost(0).traffic == uneven.traffic(0)
    full = [plan(4, "parallel.ep=2", imbalance).traffic(0) for imbalance in (1.0, 1.5)]
    assert full[0] == full[1]


def test_traffic_adds_scales_and_shares() -> None:
    one = Traffic()
    one.add("tp", "send", 10, calls=3)
    one.add("tp", "all_reduce", 4)
    assert (one + one).bytes == one.times(2).bytes == {("tp", "send"): 60, ("tp", "all_reduce"): 8}
    assert one.times(2).over(2) == one
    sends, rest = one.split(("send",))
    assert sends.calls == {("tp", "send"): 3} and rest.bytes == {("tp", "all_reduce"): 4}
    assert one.by_axis() == {"tp": 34}
    with pytest.raises(ValueError, match="not 2 equal shares"):
        one.over(2)


def test_what_leaves_a_rank_of_four() -> None:
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send", "receive", "broadcast")
    assert [share_sent(kind, 4) for kind in kinds] == [0.75, 0.75, 0.75, 1.5, 1, 0, 1]


def test_a_group_of_all_ranks_is_named_by_its_use() -> None:
    data = ParallelDims(dp_shard=4, ep=4)
    assert {traffic_axis(data, axis, "all_gather") for axis in ("fsdp", "data", "loss", "all")} == {"fsdp"}
    assert {traffic_axis(data, axis, "all_to_all") for axis in ("ep", "all")} == {"ep"}
    assert {traffic_axis(data, axis, "all_reduce") for axis in ("data", "all")} == {"all"}
    assert traffic_axis(ParallelDims(tp=4), "all", "all_gather") == "edp"
    assert traffic_axis(ParallelDims(dp_shard=2, tp=2), "fsdp", "all_gather") == "fsdp"
