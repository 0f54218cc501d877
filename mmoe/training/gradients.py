"""Computes the gradients of one optimizer step: its micro-batches forward and backward, on one rank or together.

Shape suffixes: N layers of experts, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmoe.losses.report import LossReport
from mmoe.losses.term import LossContext, LossTerm
from mmoe.losses.total import LossTerms
from mmoe.models.decoder import ModelOutput, MultimodalModel
from mmoe.models.moe.balance import ExpertLoadAccumulator
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.parallel.pipeline_schedule import Losses
from mmoe.parallel.ranks import StepExecutor
from mmoe.parallel.setting import RankSetting
from mmoe.precision.config import PrecisionConfig
from mmoe.schema.batch import PackedBatch
from mmoe.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class StepGradients:
    """Holds what the backward passes of a step left beside the gradients in the parameters, the same on every rank.

    `norm` is that of all gradients, `router_norms_NE` that of each expert's router weights, both before clipping;
    `loads` are of the routers on this rank.
    """

    report: LossReport
    routing: RoutingStatistics | None
    loads: ExpertLoadAccumulator
    norm: Tensor
    router_norms_NE: Tensor | None


@dataclass(frozen=True)
class StepSetting:
    """Holds what the steps of a run have in common; `micro_batches` of each rank make a step."""

    terms: LossTerms
    precision: PrecisionConfig
    vocabulary: Vocabulary
    device: torch.device
    ranks: StepExecutor
    micro_batches: int
    cached: bool  # contrastive groups are wider than what is embedded at the same time: the step has a first pass

    @classmethod
    def from_run(
        cls, run: RankSetting, vocabulary: Vocabulary, device: torch.device, ranks: StepExecutor
    ) -> "StepSetting":
        """Derive the setting of a run's steps from `run`, which is what ranks read of its config."""
        return cls(
            run.loss_terms, run.precision, vocabulary, device, ranks, run.batch.accumulation, run.needs_embedding_pass
        )

    def autocast(self) -> AbstractContextManager:
        """Return the context in which forward passes and losses are computed."""
        return self.precision.autocast(self.device)


def step_gradients(
    model: MultimodalModel,
    batches: Iterable[PackedBatch],
    denominators: Mapping[str, float],
    setting: StepSetting,
    seed: int,
) -> StepGradients:
    """Accumulate the gradients of `batches` (of this replica) in the parameters, summed over the ranks.

    `denominators` are what the plan counted of each loss term in the step (`LossTerms.denominators`). `seed` is of all
    that the step draws, on every rank: gating noise, which differs by token (`mmoe.models.moe.noise`).
    """
    torch.manual_seed(seed)
    ranks = setting.ranks
    cached: Sequence[dict[str, Any]] = [{}] * setting.micro_batches
    if setting.cached and (coupled := setting.terms.coupled(denominators)):
        batches = list(batches)
        cached = _prepass(model, batches, coupled, denominators, setting)

    def losses(output: ModelOutput, batch: PackedBatch, number: int, loads: ExpertLoadAccumulator) -> LossReport:
        part, before = ranks.part(model), cached[number]
        return setting.terms.compute(model, output, batch, denominators, setting.vocabulary, loads, part, before)

    if ranks.pipeline is None:
        report, routing, loads = _one_by_one(model, batches, losses, setting)
    else:
        report, routing, loads = ranks.pipeline.run([batch.to(setting.device) for batch in batches], losses)
    norm, router_norms = ranks.finish_gradients(model)
    return StepGradients(ranks.sum_report(report), ranks.sum_routing(routing), loads, norm, router_norms)


def _one_by_one(
    model: MultimodalModel, batches: Iterable[PackedBatch], losses: Losses, setting: StepSetting
) -> tuple[LossReport, RoutingStatistics | None, ExpertLoadAccumulator]:
    """Each micro-batch forward and backward before the next one."""
    ranks = setting.ranks
    report, routing, loads = LossReport.zero(), None, ExpertLoadAccumulator(ranks.sum_over_data)
    for number, batch in enumerate(batches):
        batch = batch.to(setting.device)
        ranks.before_backward(model, last=number + 1 == setting.micro_batches)
        with setting.autocast():
            output = ranks.forward(model, batch)
            part_report = losses(output, batch, number, loads)
        part_report.loss_for_backward.backward()
        report = report + part_report.detach()
        if output.routing is not None:
            routing = output.routing if routing is None else routing + output.routing
    return report, routing, loads


def _prepass(
    model: MultimodalModel,
    batches: list[PackedBatch],
    terms: list[LossTerm],
    denominators: Mapping[str, float],
    setting: StepSetting,
) -> list[dict[str, Any]]:
    """The first pass of two: what each of the terms finds in the second, by micro-batch and name.

    Of a pipeline, the ranks of the last stage have them; the list of the others is empty.
    """
    ranks, part = setting.ranks, setting.ranks.part(model)
    embedded: dict[str, list[Any]] = {term.name: [] for term in terms}
    hidden: Tensor | None = None
    for batch in batches:
        batch = batch.to(setting.device)
        with torch.no_grad():
            if ranks.pipeline is not None:
                hidden = ranks.pipeline.hidden(batch)
            else:
                with setting.autocast():
                    hidden = ranks.forward(model, batch).hidden
            if hidden is not None:
                for term in terms:
                    planned = denominators[term.name]
                    context = LossContext(model, hidden, batch, setting.vocabulary, planned, part, router={})
                    embedded[term.name].append(term.embed(context))
    if hidden is None:
        return []
    found = {term.name: term.prepass(embedded[term.name], part) for term in terms}
    return [{name: each[number] for name, each in found.items()} for number in range(len(batches))]
