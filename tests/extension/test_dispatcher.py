"""Dispatchers, an exchange and an expert engine that this file alone defines: trained on one process and on two."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.config import registry
from mmoe.config.load import dump, load, validate
from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.dispatch import DISPATCHERS, CapacityDispatcher, LocalDispatcher, TokenPermutation, by_expert
from mmoe.models.moe.engines.engine import EXPERT_ENGINES, ExpertEngine
from mmoe.models.moe.router import Routing
from mmoe.models.moe.rows import count, permute_tokens, unpermute_tokens
from mmoe.models.moe.tokens import Tokens
from mmoe.parallel.collectives import all_gather_no_grad, all_gather_scatter_grad, reduce_scatter_gather_grad
from mmoe.parallel.expert import PARALLEL_DISPATCHERS, ParallelDispatcher
from mmoe.parallel.sharding_table import Unit, unit_of
from mmoe.recipe.config import RunConfig
from tests.distributed.compare import differences
from tests.distributed.pool import Pool
from tests.distributed.step import MODEL, Case, train
from tests.planning.dry_run_small import plan


@DISPATCHERS.register("last_first")
class LastFirstDispatcher(LocalDispatcher):
    """Sorts the rows of an expert from the last token to the first; on many ranks rows travel as they are routed."""

    def plan(self, routing: Routing, tokens: Tokens) -> TokenPermutation:
        expert = routing.expert_TK.flatten()
        slot = len(expert) - 1 - expert.flip(0).argsort(stable=True)
        row = slot.argsort()
        ends = count(expert, self.experts).cumsum(0).int()
        return TokenPermutation(row.view_as(routing.expert_TK), slot, ends, complete=True)


@DISPATCHERS.register("gathering")
class GatheringDispatcher(LastFirstDispatcher):
    """As the one above on one process; on many ranks by the exchange below."""

    exchange = "gathering"


@dataclass(frozen=True)
class Gathered:
    """`all` places the choices of the tokens of all ranks (n, T at most) that are of experts here."""

    all: TokenPermutation
    dropped_TK: Tensor
    most: int

    complete = True

    @property
    def ends_E(self) -> Tensor:
        return self.all.ends_E


@PARALLEL_DISPATCHERS.register("gathering")
class GatheringParallelDispatcher(ParallelDispatcher[Gathered]):
    """Every rank computes its experts for the tokens of all ranks, and the ranks add up what they have."""

    def plan(self, routing: Routing, tokens: Tokens) -> Gathered:
        expert_TK = routing.expert_TK
        most = int(all_gather_no_grad(torch.tensor([len(expert_TK)]), self.group).max())
        everywhere = all_gather_no_grad(_filled(expert_TK, most, -1), self.group).flatten(0, 1)
        here = self.local.experts // self.ranks
        own = everywhere - torch.distributed.get_rank(self.group) * here
        placed = by_expert(torch.where((own >= 0) & (own < here), own, here), here + 1, 1)
        rows = int(placed.ends_E[here - 1])
        all_ranks = TokenPermutation(placed.row_TK.clamp(max=rows), placed.slot_R[:rows], placed.ends_E[:here], False)
        return Gathered(all_ranks, torch.zeros_like(expert_TK, dtype=torch.bool), most)

    def dispatch(self, x_TD: Tensor, permutation: Gathered) -> Tensor:
        everywhere = all_gather_scatter_grad(_filled(x_TD, permutation.most), self.group).flatten(0, 1)
        row_TK = permutation.all.row_TK
        return permute_tokens(everywhere, permutation.all.slot_R, row_TK.flatten(), row_TK.shape[1])

    def wait(self, rows_RD: Tensor, permutation: Gathered) -> Tensor:
        return rows_RD

    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: Gathered) -> Tensor:
        weight = all_gather_scatter_grad(_filled(weight_TK, permutation.most), self.group).flatten(0, 1)
        parts = unpermute_tokens(y_RD, weight, permutation.all.row_TK, permutation.all.slot_R, False)
        return reduce_scatter_gather_grad(parts.unflatten(0, (self.ranks, -1)), self.group)[: len(weight_TK)]


def _filled(x: Tensor, rows: int, value: int = 0) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - len(x)), value=value)


@EXPERT_ENGINES.register("batched")
class BatchedEngine(ExpertEngine):
    """Multiplies every row with the weights of every expert, and takes the right ones."""

    saved_ops = frozenset({torch.ops.aten.bmm.default})

    def swiglu(self, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        row = torch.arange(len(x_RD), device=x_RD.device)
        x_ERD = x_RD.expand(len(gate_EDF), -1, -1)
        return ((F.silu(x_ERD @ gate_EDF) * (x_ERD @ up_EDF)) @ down_EFD)[
            torch.searchsorted(ends_E, row, right=True), row
        ]


@EXPERT_ENGINES.register("wide")
class WideEngine(BatchedEngine):
    """Wants widths and a precision that the model does not have."""

    multiple = 64
    dtypes = frozenset({torch.bfloat16})


def case(moe: dict[str, Any] | None = None, **parallel: Any) -> Case:
    return Case(micro=2, model={"moe": moe or {}}, parallel=parallel)


def trained(case: Case, world: int) -> dict[str, np.ndarray]:
    """All weights after two steps. It stands here so that the processes that run it import this module."""
    return train(case, world, muon=False, steps=2)


@cache
def built_in() -> dict[str, np.ndarray]:
    return trained(case(), 1)


NAMED = [{"dispatcher": "last_first"}, {"dispatcher": "gathering"}, {"expert_backend": "batched"}]


@pytest.mark.parametrize("moe", NAMED, ids=str)
def test_it_trains_to_the_weights_of_the_built_in_one(moe) -> None:
    assert not differences("weights", trained(case(moe), 1), built_in(), 1e-11)


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}], ids=str)
@pytest.mark.parametrize("moe", NAMED, ids=str)
def test_it_trains_on_two_processes_to_the_weights_of_one(two: Pool, moe, parallel) -> None:
    many = replace(case(moe), parallel=parallel)
    assert not differences("weights", two.run(trained, many, 2)[0], built_in(), 1e-11)


def test_an_exchange_that_cannot_split_sequences_gives_way_to_one_that_can(two: Pool) -> None:
    many = replace(case({"dispatcher": "gathering"}), parallel={"ep": 2, "tp": 2})
    assert not differences("weights", two.run(trained, many, 2)[0], built_in(), 1e-11)


def test_packages_offer_them_and_yaml_names_them(monkeypatch, tmp_path) -> None:
    points = [
        EntryPoint("theirs", f"{__name__}:LastFirstDispatcher", "mmoe.dispatchers"),
        EntryPoint("theirs", f"{__name__}:BatchedEngine", "mmoe.expert_engines"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    named = ["model.moe.dispatcher=theirs", "model.moe.capacity_factor=null", "model.moe.expert_backend=theirs"]
    config = load(RunConfig, "configs/moe_10b.yaml", named)
    assert config.model.moe.dispatcher_class is LastFirstDispatcher
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(RunConfig, tmp_path / "config.yaml") == config


def test_a_capacity_factor_chooses_among_the_built_in_ones() -> None:
    assert _model({"capacity_factor": 1.5}).moe.dispatcher_class is CapacityDispatcher
    assert _model({"capacity_factor": 1.5}).moe.dispatcher is None


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (
            {"dispatcher": "last_furst"},
            "moe.dispatcher: 'last_furst' is not a kind of dispatcher; did you mean last_first",
        ),
        ({"dispatcher": "capacity"}, "dispatcher is capacity, which needs a capacity_factor; set one"),
        (
            {"dispatcher": "last_first", "capacity_factor": 1.0},
            "dispatcher is last_first, which has no use for a capacity_factor; set that to null, or dispatcher to",
        ),
        ({"expert_backend": "loops"}, "moe.expert_backend: 'loops' is not a kind of expert engine; did you mean loop"),
        (
            {"expert_backend": "wide"},
            "intermediate_size is 32, but model.moe.expert_backend wide needs a multiple of 64; round it or .* or loop",
        ),
        (
            {"expert_backend": "wide", "intermediate_size": 64},
            "d_model is 32, but model.moe.expert_backend wide needs a multiple of 64",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_does(moe, words) -> None:
    with pytest.raises(ConfigError, match=words):
        _model(moe)


def test_a_precision_that_an_engine_lacks_is_refused_with_the_config() -> None:
    for engine in ("wide", "grouped_mm"):
        words = f"model.moe.expert_backend is {engine}, which has no float64 kernel; set it to batched or loop"
        with pytest.raises(ConfigError, match=words):
            load(RunConfig, "configs/moe_10b.yaml", [f"model.moe.expert_backend={engine}", "precision.compute=float64"])


def test_a_dry_run_sends_and_computes_by_the_formula() -> None:
    named = "model.moe.dispatcher=last_first model.moe.capacity_factor=null parallel.ep=2"
    ours, theirs = plan(4, named), plan(4, "model.moe.capacity_factor=null parallel.ep=2")
    assert ours.cost(3).traffic == ours.traffic(3) == theirs.traffic(3)
    assert ours.flops(3) == theirs.flops(3)


def test_parameters_that_the_table_does_not_know_belong_to_their_block_or_the_root() -> None:
    assert unit_of("losses.depth.head.weight") == Unit("")
    assert unit_of("decoder.blocks.3.adapter.weight") == Unit("decoder.blocks.3")


def _model(moe: dict[str, Any]) -> ModelConfig:
    return validate(ModelConfig, MODEL | {"moe": MODEL["moe"] | moe}, "test")
