"""Defines what the losses of a micro-batch, or of a step, report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmoe.schema.modality import Modality


@dataclass(frozen=True)
class LossReport:
    """Holds the losses of a micro-batch; reports of a step, from all processes, add up to the report of the step.

    `loss_for_backward` is the scalar to differentiate, `loss` its detached share of the step's loss: they differ where
    several processes work out a term together (`LossShare`). By the name of a term: `terms` are the parts of `loss`
    before their weights, item sums over planned counts, detached; `items` is [sources, modalities, 2] f64, sum and
    number of the items present, unweighted; `events` [n] f64 counts its `event_names`. A term that a step has nothing
    of is in none of them.
    """

    loss_for_backward: Tensor
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    items: dict[str, Tensor] = field(default_factory=dict)
    events: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zero(cls) -> LossReport:
        """Make the report of nothing: the start of a sum."""
        return cls(torch.zeros(()), torch.zeros(()))

    def __add__(self, other: LossReport) -> LossReport:
        return LossReport(
            self.loss_for_backward + other.loss_for_backward,
            self.loss + other.loss,
            _merge(self.terms, other.terms),
            _merge(self.items, other.items),
            _merge(self.events, other.events),
        )

    def detach(self) -> LossReport:
        """Give the report without the graph behind its objective."""
        return replace(self, loss_for_backward=self.loss_for_backward.detach())

    def by_modality(self, term: str) -> dict[Modality, float]:
        """Average a term over the items present, by modality, where there are any."""
        means = _means(self.items[term].sum(0)) if term in self.items else {}
        return {Modality(kind): mean for kind, mean in means.items()}

    def by_source(self, term: str) -> dict[int, float]:
        """Average a term over the items present, by the number of the source, where there are any."""
        return _means(self.items[term].sum(1)) if term in self.items else {}


def _merge(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(a)
    for name, value in b.items():
        merged[name] = _add(merged[name], value) if name in merged else value
    return merged


def _add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; the table with fewer sources counts zero for the rest."""
    if a.ndim and len(a) != len(b):
        a, b = (a, b) if len(a) > len(b) else (b, a)
        b = torch.cat([b, b.new_zeros(len(a) - len(b), *b.shape[1:])])
    return a + b


def _means(table: Tensor) -> dict[int, float]:
    return {row: total / number for row, (total, number) in enumerate(table.tolist()) if number}
