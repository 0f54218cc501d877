"""What a step reports, added up over all ranks in one reduction each."""

from dataclasses import fields
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.losses.total import LossReport
from mmoe.models.moe.statistics import CAPACITY_FACTORS, RoutingStatistics
from mmoe.schema.sample import Modality

TERMS = ("ce", "contrastive", "action", "balance_sequence", "balance_micro_batch", "balance_global_batch", "router_z")
ITEMS = ("ce", "contrastive", "action")
EVENTS = ("pairs", "compared", "correct", "same_text")


def sum_report(report: LossReport, sources: int, device: torch.device) -> LossReport:
    """The report of all ranks; a rank may lack terms and sources that others have."""
    shape = (sources, len(Modality), 2)
    parts: list[Tensor] = [report.total.reshape(1)]
    for values, names in ((report.terms, TERMS), (report.events, EVENTS)):
        parts += [torch.tensor([name in values for name in names])]
        parts += [values[name].reshape(1) if name in values else torch.zeros(1) for name in names]
    for name in ITEMS:
        table = torch.zeros(shape, dtype=torch.float64, device=device)
        if name in report.items:
            table[: len(report.items[name])] = report.items[name]
        parts += [torch.tensor([name in report.items]), table.flatten()]
    flat = torch.cat([part.to(device, torch.float64) for part in parts])
    dist.all_reduce(flat)
    rest = iter(flat.split([1, len(TERMS), *[1] * len(TERMS), len(EVENTS), *[1] * len(EVENTS), *[1, prod(shape)] * 3]))
    total = next(rest).squeeze()
    found: list[dict[str, Tensor]] = []
    for names in (TERMS, EVENTS):
        present = next(rest).tolist()
        sums = [next(rest).squeeze() for _ in names]
        found.append({name: value for name, there, value in zip(names, present, sums, strict=True) if there})
    items = {}
    for name in ITEMS:
        present, table = next(rest), next(rest)
        if present.item():
            items[name] = table.view(shape)
    return LossReport(report.objective, total, found[0], items, found[1])


def sum_routing(
    routing: RoutingStatistics | None, shape: tuple[int, int, int], rows: list[int], counts: bool, device: torch.device
) -> RoutingStatistics:
    """Of all ranks; `shape` is (layers of experts, sources, experts) of the whole model.

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
