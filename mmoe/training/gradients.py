"""The gradients of one optimizer step: its micro-batches forward and backward, alone or with the other ranks."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmoe.losses.cached import CachedInfoNCE, Embedded, cache
from mmoe.losses.total import LossConfig, LossReport, PlannedCounts, compute
from mmoe.models.decoder import ModelOutput, MultimodalModel
from mmoe.models.moe.balance import StepLoads
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.parallel.pipeline_schedule import Losses
from mmoe.parallel.ranks import Ranks
from mmoe.parallel.setting import RankSetting
from mmoe.precision.config import PrecisionConfig
from mmoe.schema.batch import PackedBatch
from mmoe.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class StepGradients:
    """What the backward passes of a step left beside the gradients in the parameters, the same on every rank.

    `norm` is that of all gradients, `router_norms_NE` that of each expert's router weights, both before clipping;
    `loads` are of the routers on this rank.
    """

    report: LossReport
    routing: RoutingStatistics | None
    loads: StepLoads
    norm: Tensor
    router_norms_NE: Tensor | None


@dataclass(frozen=True)
class StepSetting:
    """What the steps of a run have in common; `micro_batches` of each rank make a step."""

    losses: LossConfig
    precision: PrecisionConfig
    vocabulary: Vocabulary
    device: torch.device
    ranks: Ranks
    micro_batches: int
    cached: bool  # contrastive groups are wider than what is embedded at the same time

    @classmethod
    def of(cls, run: RankSetting, vocabulary: Vocabulary, device: torch.device, ranks: Ranks) -> "StepSetting":
        """Derive the setting of a run's steps from what is resolved of it."""
        return cls(run.losses, run.precision, vocabulary, device, ranks, run.batch.accumulation, run.embeds_first)

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes and losses."""
        return self.precision.autocast(self.device)


def step_gradients(
    model: MultimodalModel, batches: Iterable[PackedBatch], counts: PlannedCounts, setting: StepSetting, seed: int
) -> StepGradients:
    """Accumulate the gradients of `batches` (of this replica) in the parameters, summed over the ranks.

    `seed` is of all that the step draws, on every rank: gating noise, which differs by token (`mmoe.models.moe.noise`).
    """
    torch.manual_seed(seed)
    ranks = setting.ranks
    cached: Sequence[CachedInfoNCE | None] = [None] * setting.micro_batches
    if setting.cached and counts.pairs:
        batches = list(batches)
        cached = _contrast(model, batches, setting)

    def losses(output: ModelOutput, batch: PackedBatch, number: int, loads: StepLoads) -> LossReport:
        config, vocabulary, part = setting.losses, setting.vocabulary, ranks.part(model)
        return compute(model, output, batch, counts, config, vocabulary, loads, part, cached[number])

    if ranks.pipeline is None:
        report, routing, loads = _one_by_one(model, batches, losses, setting)
    else:
        report, routing, loads = ranks.pipeline.run([batch.to(setting.device) for batch in batches], losses)
    norm, router_norms = ranks.finish_gradients(model)
    return StepGradients(ranks.sum_report(report), ranks.sum_routing(routing), loads, norm, router_norms)


def _one_by_one(
    model: MultimodalModel, batches: Iterable[PackedBatch], losses: Losses, setting: StepSetting
) -> tuple[LossReport, RoutingStatistics | None, StepLoads]:
    """Each micro-batch forward and backward before the next one."""
    ranks = setting.ranks
    report, routing, loads = LossReport.zero(), None, StepLoads(ranks.sum_over_data)
    for number, batch in enumerate(batches):
        batch = batch.to(setting.device)
        ranks.before_backward(model, last=number + 1 == setting.micro_batches)
        with setting.autocast():
            output = ranks.forward(model, batch)
            part_report = losses(output, batch, number, loads)
        part_report.objective.backward()
        report = report + part_report.detach()
        if output.routing is not None:
            routing = output.routing if routing is None else routing + output.routing
    return report, routing, loads


def _contrast(model: MultimodalModel, batches: list[PackedBatch], setting: StepSetting) -> list[CachedInfoNCE]:
    """The first pass of two: the contrastive losses of all micro-batches and their gradients by embedding.

    Of a pipeline, the ranks of the last stage have them; the list of the others is empty.
    """
    ranks, embedded = setting.ranks, []
    part = ranks.part(model)
    for batch in batches:
        batch = batch.to(setting.device)
        with torch.no_grad():
            if ranks.pipeline is not None:
                hidden = ranks.pipeline.hidden(batch)
            else:
                with setting.autocast():
                    hidden = ranks.forward(model, batch).hidden
            if hidden is not None:
                pairs = part.own_pairs(batch.pairs)
                embedded.append(Embedded(*model.contrast(hidden, pairs, batch.modality), pairs))
    return cache(embedded, setting.losses.contrastive.tau, part.gather_pairs) if embedded else []
