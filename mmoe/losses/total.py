"""Computes the training objective: every term a sum over items divided by what the plan counted for the step.

``total = sum_term weight_term * sum_items(term) / planned(term)``

Adding the totals of a step's micro-batches gives the step's loss, however the step is cut (design.md, "Loss
scaling"): no micro-batch divides by its own count. Names of terms, their items and events are those of `LossTerms` on
every rank, whatever a rank meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.losses.loss_share import FULL_SHARE, LossShare
from mmoe.losses.report import LossReport
from mmoe.losses.term import Items, LossContext, LossTerm
from mmoe.models.moe.balance import BalanceConfig, ExpertLoadAccumulator
from mmoe.schema.batch import PackedBatch
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mmoe.models.decoder import ModelOutput, MultimodalModel
    from mmoe.models.embeddings import ModelInputs


class LossTerms(Sequence[LossTerm]):
    """Holds the terms of a run's loss, in the order in which they are added up."""

    def __init__(self, terms: Sequence[LossTerm], balance: BalanceConfig) -> None:
        """Make them of the terms of the recipe and of the routers' losses that `balance` says are worked out.

        Raises ConfigError for two terms of one name.
        """
        self._terms, self._balance = tuple(terms), balance
        names = [term.name for term in terms]
        if wrong := [name for name in names if not name.isidentifier() or hasattr(nn.ModuleDict, name)]:
            raise ConfigError(
                f"a term of the loss cannot be named {wrong[0]}, as its head would be; give it one of small letters, "
                "e.g. name: my_term"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"two terms of the loss are named {twice[0]}; give that of losses.terms a name of its own, e.g. name: "
                f"{twice[0]}_2"
            )

    def __getitem__(self, at: Any) -> Any:
        return self._terms[at]

    def __len__(self) -> int:
        return len(self._terms)

    def heads(self, inputs: ModelInputs, d_model: int) -> dict[str, nn.Module]:
        """Build the terms' own modules by name, of those that have one."""
        built = ((term.name, term.head(inputs, d_model)) for term in self)
        return {name: head for name, head in built if head is not None}

    def denominators(self, counts: Counts, sequences: int) -> dict[str, float]:
        """Count the items of each term in a step of so many sequences whose plan counted `counts`."""
        return {term.name: term.denominator(counts, sequences) for term in self}

    def coupled(self, denominators: Mapping[str, float]) -> list[LossTerm]:
        """Choose the terms of a step whose items depend on other micro-batches'."""
        return [term for term in self if term.couples and denominators[term.name]]

    def compute(
        self,
        model: MultimodalModel,
        output: ModelOutput,
        batch: PackedBatch,
        denominators: Mapping[str, float],
        vocabulary: Vocabulary,
        loads: ExpertLoadAccumulator,
        part: LossShare = FULL_SHARE,
        cached: Mapping[str, Any] | None = None,
    ) -> LossReport:
        """Compute every term of one micro-batch, given the model's `output` on it and the step's `denominators`.

        `output.hidden` is of the whole batch, of whose losses this process works out `part`. `loads` are those of the
        step before this micro-batch; its own are added. `cached` is, by term, what its pass before this one gave.

        Raises ValueError when the batch holds items of a term of which the plan counted none.
        """
        router = output.auxiliary.terms(loads, self._balance) if output.auxiliary is not None else {}
        context = partial(LossContext, model, output.hidden, batch, vocabulary, part=part, router=router)
        loss_for_backward = output.hidden.new_zeros((), dtype=torch.promote_types(output.hidden.dtype, torch.float32))
        loss = loss_for_backward.detach()
        shares, items, events = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for term in self:
            planned = denominators[term.name]
            sums = term.compute(context(planned=planned, cached=(cached or {}).get(term.name)))
            if sums is None:
                continue
            value = _over(sums.total, planned, term.name)
            loss_for_backward = loss_for_backward + term.weight * value
            shares[term.name] = value.detach() * sums.reports
            loss = loss + term.weight * shares[term.name]
            if sums.items is not None and term.itemized:
                items[term.name] = _table(sums.items, batch) * sums.reports
            if term.event_names:
                counted = [sums.events[name].double() for name in term.event_names]
                events[term.name] = torch.stack(counted) * sums.reports
        return LossReport(loss_for_backward, loss, shares, items, events)

    def figures(self, report: LossReport, sources: Sequence[str]) -> dict[str, float]:
        """Break a step down into flat scalars: ``ce_text``, ``ce_from_<source>``, ``contrastive_accuracy``, ..."""
        record: dict[str, float] = {}
        for term in self:
            if term.by_modality:
                means = report.by_modality(term.name)
                record |= {f"{term.name}_{kind.name.lower()}": mean for kind, mean in means.items()}
            means_by_source = report.by_source(term.name)
            record |= {f"{term.name}_from_{sources[number]}": mean for number, mean in means_by_source.items()}
            if term.name in report.events:
                events = dict(zip(term.event_names, report.events[term.name].tolist(), strict=True))
                record |= {f"{term.name}_{name}": value for name, value in term.figures(events).items()}
        return record


def _table(items: Items, batch: PackedBatch) -> Tensor:
    """Sum and count the items by source and modality, f64 [sources, modalities, 2]."""
    sources = 1 + max((document[0] for documents in batch.documents for document in documents), default=-1)
    rows = torch.stack([items.values_n.detach().double(), items.numbers_n.double()], dim=1)
    kinds = len(Modality)
    cell = batch.source.flatten()[items.position_n].long() * kinds + items.modality_n.long()
    return rows.new_zeros(sources * kinds, 2).index_add_(0, cell, rows).view(sources, kinds, 2)


def _over(total: Tensor, planned: float, name: str) -> Tensor:
    if planned > 0:
        return total / planned
    if total.detach() != 0:
        raise ValueError(f"the plan of this step counted nothing of the loss term {name}, but the batch holds some")
    return total
