"""`mmoe train CONFIG --dry-run`: what chosen ranks of a large mesh would hold, send and compute, as tables."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from rich.table import Table

from mmoe.commands.console import Console
from mmoe.errors import ConfigError
from mmoe.models.flops import ParameterCounts, RankWork, computed_flops, model_flops
from mmoe.parallel.build import degrees_of
from mmoe.parallel.mesh import Degrees
from mmoe.parallel.pipeline import on_meta
from mmoe.planning.communication import Communication, MicroBatch
from mmoe.planning.communication_traffic import Traffic
from mmoe.planning.dry_run import RankCost, dry_run
from mmoe.planning.dry_run_batch import Assumed, Documents
from mmoe.planning.dry_run_routing import Load
from mmoe.planning.memory import StateMemory
from mmoe.planning.memory_shards import Place
from mmoe.recipe.config import RunConfig

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a dry run is of."""

    config: RunConfig
    degrees: Degrees
    assumed: Assumed
    documents: Documents
    load: Load

    @classmethod
    def of(cls, config: RunConfig, world: int, imbalance: float, documents: int, vocabulary: int | None) -> Plan:
        """Raises ConfigError where the config cannot run on `world` ranks."""
        degrees = degrees_of(config, world)
        micro = config.batch_of(degrees.replicas).micro_batch_sequences
        return cls(
            config,
            degrees,
            Assumed.of(config, vocabulary),
            Documents.of(config, micro, documents),
            Load.of(imbalance, config.model, degrees),
        )

    def cost(self, rank: int) -> RankCost:
        """By the dry run."""
        return dry_run(self.config, self.degrees.world, rank, self.assumed, self.documents, self.load)

    def place(self, rank: int) -> Place:
        """Find where the rank is on the axes that cut parameters."""
        within = rank % (self.degrees.world // self.degrees.pp)
        return Place(within // self.degrees.tp % self.degrees.fsdp, within % self.degrees.tp)

    def stage(self, rank: int) -> int:
        """Give the pipeline stage of the rank."""
        return rank // (self.degrees.world // self.degrees.pp)

    def labels(self, rank: int) -> int:
        """That the rank works out in a micro-batch."""
        context = rank // self.degrees.tp % self.degrees.cp
        return len(range(context, self.documents.sequences * self.documents.labels, self.degrees.cp))

    def micro_batch(self, rank: int) -> MicroBatch:
        """Count what the rank works out of a micro-batch: labels, pairs, and choices of experts."""
        degrees, moe = self.degrees, self.config.model.moe
        pairs = -(-self.documents.sequences * self.documents.count // degrees.sequence_ranks)
        if moe is None:
            return MicroBatch(self.labels(rank), pairs)
        choices = self.documents.sequences * self.documents.length // degrees.sequence_ranks * moe.top_k
        sent = self.load.sent(choices, degrees.ep, rank % degrees.ep, moe.capacity_factor)
        return MicroBatch(self.labels(rank), pairs, sum(sent), sent[rank % degrees.ep] * degrees.ep)

    def traffic(self, rank: int) -> Traffic:
        """By the formula."""
        model = on_meta(self.config, self.assumed.inputs, self.degrees, self.stage(rank))
        formula = Communication(self.config, self.degrees, model, self.place(rank))
        return formula.step(self.micro_batch(rank), len(self.config.data.sources))

    def memory(self, rank: int) -> StateMemory:
        """By the formula."""
        model = on_meta(self.config, self.assumed.inputs, self.degrees, self.stage(rank))
        return StateMemory.of(self.config, self.degrees, model, self.place(rank))

    def flops(self, rank: int) -> int:
        """Of a step, by the formula."""
        config, degrees = self.config, self.degrees
        model = on_meta(config, self.assumed.inputs, degrees, self.stage(rank))
        formula = Communication(config, degrees, model, self.place(rank))
        documents = (self.documents.size,) * (self.documents.count * self.documents.sequences)
        work = RankWork(documents, self.labels(rank), formula.expert_rows(self.micro_batch(rank)))
        vocabulary = self.assumed.inputs.vocabulary_size
        micro = computed_flops(config, degrees, vocabulary, formula.layers, formula.last, work)
        return micro * config.batch_of(degrees.replicas).accumulation


def show_dry_run(plan: Plan, ranks: list[int], console: Console) -> None:
    """Run and print; without `ranks`, the first rank of the first, of a middle and of the last pipeline stage."""
    started = time.perf_counter()
    world, pp = plan.degrees.world, plan.degrees.pp
    ranks = ranks or [world // pp * stage for stage in sorted({0, pp // 2, pp - 1})]
    for rank in ranks:
        if not 0 <= rank < world:
            raise ConfigError(f"--rank is {rank}, but --world-size {world} has the ranks 0 to {world - 1}")
    _introduce(plan, console)
    # A process each: torch keeps the groups of a mesh that it has seen, and ranks that cost the same run at once.
    workers = min(len(ranks), os.cpu_count() or 1)
    with get_context("spawn").Pool(workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        costs = pool.map(plan.cost, ranks, chunksize=1)
    for cost in costs:
        _show(plan, cost, console)
    console.print(f"{len(ranks)} of {world} ranks in {time.perf_counter() - started:.0f} s")


def _introduce(plan: Plan, console: Console) -> None:
    config, degrees = plan.config, plan.degrees
    counts = ParameterCounts.of(config.model, plan.assumed.inputs)
    console.print(degrees.table())
    console.print(config.batch_of(degrees.replicas).table())
    console.print(f"assumed: {plan.assumed.sentence()}; {plan.documents.sentence()}", soft_wrap=True)
    if config.model.moe is not None:
        console.print(
            f"assumed: the busiest rank of ep gets {plan.load.imbalance:g} times the mean of the choices (shown as if "
            "every rank shown were the busiest); rows of a capacity are full whatever is routed",
            soft_wrap=True,
        )
    console.print(
        f"parameters: {counts.total / 1e9:.3f}B in blocks and tables, {counts.active / 1e9:.3f}B active with the input "
        f"table, {counts.multiplied / 1e9:.3f}B in the products of a token; {counts.others / 1e6:.1f}M in other "
        "embeddings and heads",
        soft_wrap=True,
    )


def _show(plan: Plan, cost: RankCost, console: Console) -> None:
    state, formula = plan.memory(cost.rank), plan.traffic(cost.rank)
    title = f"rank {cost.rank}, stage {cost.stage}: {cost.parameters:,} parameters"
    table = Table("memory", "GiB", "formula", title=title, title_justify="left")
    for column in (1, 2):
        table.columns[column].justify = "right"
    closed = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    for kind, size in cost.memory.items():
        table.add_row(kind, f"{size / GIB:.3f}", f"{closed[kind] / GIB:.3f}" if kind in closed else "")
    table.add_row("peak", f"{sum(cost.memory.values()) / GIB:.3f}", "", end_section=True)
    console.print(table)
    if plan.degrees.pp > 1:
        console.print(f"activations of {cost.kept} passes through a stage are kept at the same time")
    same = "equal to the formula" if formula == cost.traffic else f"the formula has {sum(formula.bytes.values()):,} B"
    console.print(cost.traffic.table(plan.degrees, f"an optimizer step of {cost.micro_batches} micro-batches; {same}"))
    documents = [plan.documents.size] * (plan.documents.count * plan.documents.sequences)
    wanted = model_flops(plan.config.model, plan.assumed.inputs, documents) * cost.micro_batches
    shared = plan.degrees.pp * plan.degrees.sequence_ranks
    console.print(
        f"TFLOP a step: {cost.flops / 1e12:.2f} computed here (formula {plan.flops(cost.rank) / 1e12:.2f}); the "
        f"model's own {wanted / shared / 1e12:.2f} (6 N and attention, an equal share of a replica's)\n",
        soft_wrap=True,
    )
