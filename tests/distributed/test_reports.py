"""Reports of ranks that have met different terms, sources and layers."""

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist

from mmoe.data.load.quarantine import FEW, Quarantine
from mmoe.errors import DataError
from mmoe.losses.config import LossConfig
from mmoe.losses.report import LossReport
from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics
from mmoe.parallel.collectives import all_reduce_no_grad
from mmoe.parallel.reports import sum_report, sum_routing
from mmoe.schema.modality import Modality
from mmoe.schema.quarantined import Quarantined
from tests.distributed.compare import check
from tests.distributed.pool import Pool
from tests.distributed.step import Case

KINDS = len(Modality)
CPU = torch.device("cpu")


def reported() -> LossReport:
    rank = dist.get_rank()
    one = torch.ones(())
    items = {"ce": torch.full((rank + 1, KINDS, 2), 1.0 + rank, dtype=torch.float64)}
    terms = {"ce": one * (rank + 1)}
    events: dict[str, torch.Tensor] = {}
    if rank == 1:
        terms["contrastive"] = one * 5
        events = {"contrastive": torch.tensor([3.0, 2.0, 1.5, 0.0], dtype=torch.float64)}
    return sum_report(LossReport(one, one * (rank + 2), terms, items, events), LossConfig().build(), 3, CPU)


def test_terms_and_sources_that_only_one_rank_has(two: Pool) -> None:
    for report in two.run(reported):
        assert float(report.loss) == 5.0
        assert {name: float(value) for name, value in report.terms.items()} == {"ce": 3.0, "contrastive": 5.0}
        assert {name: value.tolist() for name, value in report.events.items()} == {"contrastive": [3.0, 2.0, 1.5, 0.0]}
        assert list(report.items) == ["ce"] and report.items["ce"][:, 0, 0].tolist() == [3.0, 2.0, 0.0]


def statistics(layers: int, sources: int, value: int) -> RoutingStatistics:
    by_cell, by_expert = (layers, KINDS, sources, 4), (layers, 4)
    shapes = (by_cell, by_cell, (layers, len(CAPACITY_FACTORS)), (layers,), by_expert, by_expert, by_expert, (layers,))
    names = [field.name for field in fields(RoutingStatistics)]
    whole = {"load_NMSE", "drops_NMSE", "would_drop_NC", "tokens_N"}
    kinds = [torch.long if name in whole else torch.float64 for name in names]
    return RoutingStatistics(*(torch.full(shape, value, dtype=kind) for shape, kind in zip(shapes, kinds)))


def routed() -> RoutingStatistics:
    """Rank 0 has layer 1 and one source, rank 1 layers 0 and 1 and two; a big count shows that none is rounded."""
    rank = dist.get_rank()
    mine = statistics(rank + 1, rank + 1, rank + 1)
    mine = replace(mine, tokens_N=mine.tokens_N + 2**40)
    return sum_routing(mine, (3, 2, 4), [1] if rank == 0 else [0, 1], True, CPU)


def test_layers_and_sources_that_only_one_rank_has(two: Pool) -> None:
    for found in two.run(routed):
        assert found.load_NMSE[:, 0, :, 0].tolist() == [[2, 2], [3, 2], [0, 0]]
        assert found.tokens_N.tolist() == [2**40 + 2, 2**41 + 3, 0] and found.tokens_N.dtype == torch.long
        assert found.entropy_N.tolist() == [2.0, 3.0, 0.0]


def uncounted() -> RoutingStatistics:
    """Both ranks counted the same tokens; only the first says so."""
    return sum_routing(statistics(1, 1, 7), (1, 1, 4), [0], dist.get_rank() == 0, CPU)


def test_what_peers_counted_too_is_counted_once(two: Pool) -> None:
    for found in two.run(uncounted):
        assert found.tokens_N.tolist() == [7] and (found.load_NMSE == 7).all()


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"cp": 2}], ids=str)
def test_drops_late_in_a_sequence_are_counted_where_the_first_rank_has_none(two: Pool, parallel: dict) -> None:
    moe = {"capacity_factor": 1.3, "drop_policy": "position"}
    expected = check(two, Case(model={"moe": moe}, parallel=parallel))
    assert expected["routing"]["drops_NMSE"].sum() > 0


def quarantined(lost: int) -> tuple[dict[str, dict[str, int]], str]:
    """Each rank meets 50 parts of source b; the second loses `lost` of them."""
    counts = Quarantine(["a", "b"], 0.01, None)
    bad = tuple(Quarantined(1, "shard", row, str(row), "cannot be read", 7) for row in range(lost * dist.get_rank()))
    counts.add({1: 50}, bad)
    try:
        counts.settle(lambda x: all_reduce_no_grad(x, dist.group.WORLD))
    except DataError as error:
        return counts.state_dict(), str(error).split(" of ")[0]
    return counts.state_dict(), ""


def test_every_replica_knows_and_judges_what_any_of_them_has_lost(two: Pool) -> None:
    assert two.run(quarantined, 3) == [({"met": {"b": 100}, "lost": {"b": 3}}, "")] * 2
    assert [said for _, said in two.run(quarantined, FEW + 1)] == [f"source b: {FEW + 1}"] * 2
