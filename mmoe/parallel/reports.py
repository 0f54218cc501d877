"""Adds up what a step reports over all ranks, in one reduction each."""

from dataclasses import fields
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.losses.report import LossReport
from mmoe.losses.total import LossTerms
from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics
from mmoe.schema.modality import Modality


def sum_report(report: LossReport, terms: LossTerms, sources: int, device: torch.device) -> LossReport:
    """Add up the reports of all ranks; a rank may lack terms and sources that others have."""
    values = [report.loss.reshape(1)]
    for found, shapes in _tables(report, terms, sources):
        for name, shape in shapes.items():
            table = torch.zeros(shape, dtype=torch.float64, device=device)
            if name in found:
                _beginning(table, found[name]).copy_(found[name])
            values += [torch.tensor([name in found]), table.flatten()]
    flat = torch.cat([value.to(device, torch.float64) for value in values])
    dist.all_reduce(flat)
    total, rest = flat[0], flat[1:]
    summed: list[dict[str, Tensor]] = []
    for _, shapes in _tables(report, terms, sources):
        summed.append({})
        for name, shape in shapes.items():
            present, table, rest = rest.tensor_split([1, 1 + prod(shape)])
            if present.item():
                summed[-1][name] = table.view(shape)
    return LossReport(report.loss_for_backward, total, *summed)


def report_size(terms: LossTerms, sources: int) -> int:
    """Count the numbers that `sum_report` adds up."""
    shapes = [shape for _, each in _tables(LossReport.zero(), terms, sources) for shape in each.values()]
    return 1 + sum(1 + prod(shape) for shape in shapes)


def _tables(
    report: LossReport, terms: LossTerms, sources: int
) -> list[tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]]:
    """Return the report's tables by term, each with the shapes that all ranks give them."""
    return [
        (report.terms, {term.name: () for term in terms}),
        (report.items, {term.name: (sources, len(Modality), 2) for term in terms if term.itemized}),
        (report.events, {term.name: (len(term.event_names),) for term in terms if term.event_names}),
    ]


def _beginning(table: Tensor, part: Tensor) -> Tensor:
    """Return as many sources of the table as the part has; all of what is not by source."""
    return table[: len(part)] if part.ndim else table


def sum_routing(
    routing: RoutingStatistics | None, shape: tuple[int, int, int], rows: list[int], counts: bool, device: torch.device
) -> RoutingStatistics:
    """Add up the routing statistics of all ranks; `shape` is (layers of experts, sources, experts) of the whole model.

    `routing` is of the layers `rows`; a rank whose peers counted the same tokens has `counts` False.
    """
    layers, sources, experts = shape
    by_cell = (layers, len(Modality), sources, experts)
    by_expert = (layers, experts)
    shapes = (by_cell, by_cell, (layers, len(CAPACITY_FACTORS)), (layers,), by_expert, by_expert, by_expert, (layers,))
    names = [field.name for field in fields(RoutingStatistics)]
    tables = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    if routing is not None and counts:
        for name, table in zip(names, tables, strict=True):
            value = getattr(routing, name)
            for row, layer in zip(rows, value, strict=True):
                (table[row, :, : layer.shape[1]] if value.ndim == 4 else table[row]).copy_(layer)
    flat = torch.cat([table.flatten() for table in tables])
    dist.all_reduce(flat)
    whole = {"load_NMSE", "drops_NMSE", "would_drop_NC", "tokens_N"}  # exact in float64 below 2^53
    summed = zip(names, flat.split([prod(shape) for shape in shapes]), shapes, strict=True)
    return RoutingStatistics(
        **{name: (part.long() if name in whole else part).view(shape) for name, part, shape in summed}
    )
