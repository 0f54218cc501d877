"""Defines `mmoe estimate`, which computes what a step of many ranks costs, without data or devices."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmoe.commands.arguments import AsJson, Overrides, config_at
from mmoe.commands.completion import complete_config
from mmoe.commands.console import Console, console, print_json

if TYPE_CHECKING:
    from mmoe.models.flops import ParameterCounts
    from mmoe.planning.dry_run import RankCost
    from mmoe.planning.dry_run_plan import Plan

GIB = 2**30


def estimate(
    config: Annotated[
        Path,
        typer.Argument(
            help="a YAML file, e.g. configs/moe_10b.yaml, or a run's folder", autocompletion=complete_config
        ),
    ],
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="ranks")] = 1,
    rank: Annotated[list[int] | None, typer.Option(help="repeatable; default: one a stage")] = None,
    imbalance: Annotated[float, typer.Option(help="the busiest rank of ep over the mean")] = 1.0,
    documents: Annotated[int, typer.Option(min=1, help="documents that fill a sequence")] = 1,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="ids; default: the tokenizer's, or 2^17")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, memory, collectives and operations of ranks that need not exist: a dry run, and closed forms."""
    from mmoe.planning.dry_run_plan import Plan

    started = time.perf_counter()
    plan = Plan.from_config(config_at(config, overrides), world_size, imbalance, documents, vocabulary)
    ranks = plan.ranks(rank or [])
    if as_json:
        print_json(figures(plan, plan.costs(ranks)))
        return
    _introduce(plan, console)
    for cost in plan.costs(ranks):
        _show(plan, cost, console)
    console.print(f"{len(ranks)} of {world_size} ranks in {time.perf_counter() - started:.0f} s")


def figures(plan: "Plan", costs: "Iterable[RankCost]") -> dict[str, Any]:
    """Return what is assumed and what each rank holds, sends and computes: bytes, and operations of a step."""
    from mmoe.planning.communication_traffic import ranks_of

    return {
        "world_size": plan.dims.world,
        "parallel": asdict(plan.dims),
        "batch": asdict(plan.run.batch),
        "assumed": {
            "inputs": asdict(plan.assumed.inputs),
            "documents": asdict(plan.documents),
            "load": asdict(plan.load),
        },
        "parameters": asdict(_parameters(plan)),
        "ranks": [
            {
                "rank": cost.rank,
                "stage": cost.stage,
                "parameters": cost.parameters,
                "micro_batches": cost.micro_batches,
                "kept": cost.kept,
                "memory": cost.memory,
                "memory_formula": asdict(plan.memory(cost.rank)),
                "traffic": [
                    {**kind._asdict(), "ranks": ranks_of(plan.dims, kind.axis), "calls": calls, "bytes": size}
                    for kind, calls, size in cost.traffic.rows()
                ],
                "traffic_is_formula": plan.traffic(cost.rank) == cost.traffic,
                "flops": cost.flops,
                "flops_formula": plan.flops(cost.rank),
                "model_flops": plan.model_flops(cost),
            }
            for cost in costs
        ],
    }


def _parameters(plan: "Plan") -> "ParameterCounts":
    from mmoe.models.flops import ParameterCounts

    return ParameterCounts.from_config(plan.run.model, plan.assumed.inputs, plan.run.heads(plan.assumed.inputs))


def _introduce(plan: "Plan", console: Console) -> None:
    counts = _parameters(plan)
    console.print(plan.dims.table())
    console.print(plan.run.batch.table())
    console.print(f"assumed: {plan.assumed.sentence()}; {plan.documents.sentence()}", soft_wrap=True)
    if plan.run.model.moe is not None:
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


def _show(plan: "Plan", cost: "RankCost", console: Console) -> None:
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
    if plan.dims.pp > 1:
        console.print(f"activations of {cost.kept} passes through a stage are kept at the same time")
    same = "equal to the formula" if formula == cost.traffic else f"the formula has {sum(formula.bytes.values()):,} B"
    console.print(cost.traffic.table(plan.dims, f"an optimizer step of {cost.micro_batches} micro-batches; {same}"))
    console.print(
        f"TFLOP a step: {cost.flops / 1e12:.2f} computed here (formula {plan.flops(cost.rank) / 1e12:.2f}); the "
        f"model's own {plan.model_flops(cost) / 1e12:.2f} (6 N and attention, an equal share of a replica's)\n",
        soft_wrap=True,
    )
