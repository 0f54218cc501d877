"""The gradients of one optimizer step: its micro-batches forward and backward, alone or with the other ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from mmoe.config.tree import RunConfig
from mmoe.data.batch import PackedBatch
from mmoe.data.deal import Reach
from mmoe.losses.cached import CachedInfoNCE, Embedded, cache
from mmoe.losses.total import LossReport, PlannedCounts, compute
from mmoe.models.decoder import MultimodalModel
from mmoe.models.moe.balance import StepLoads
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.parallel.ranks import Ranks
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

    config: RunConfig
    vocabulary: Vocabulary
    device: torch.device
    ranks: Ranks
    micro_batches: int
    cached: bool  # contrastive groups are wider than what is embedded at the same time

    @classmethod
    def of(cls, config: RunConfig, vocabulary: Vocabulary, device: torch.device, ranks: Ranks) -> "StepSetting":
        batch = config.batch_of(ranks.replicas)
        reach = Reach.of(config.contrastive_group, batch.micro_batch_sequences, ranks.replicas)
        cached = config.losses.contrastive.weight > 0 and reach is Reach.STEP
        return cls(config, vocabulary, device, ranks, batch.accumulation, cached)


def step_gradients(
    model: MultimodalModel, batches: Iterable[PackedBatch], counts: PlannedCounts, setting: StepSetting, seed: int
) -> StepGradients:
    """Accumulate the gradients of `batches` (of this replica) in the parameters, summed over the ranks.

    `seed` is of all that the step draws: every micro-batch of every replica draws numbers of its own.
    """
    ranks, losses = setting.ranks, setting.config.losses
    report, routing, loads = LossReport.zero(), None, StepLoads(ranks.sum_over_data)
    cached: Iterable[CachedInfoNCE | None] = repeat(None)
    if setting.cached and counts.pairs:
        batches = list(batches)
        cached = _contrast(model, batches, setting, seed)
    for number, (batch, contrast) in enumerate(zip(batches, cached)):
        batch = batch.to(setting.device)
        ranks.before_backward(model, last=number + 1 == setting.micro_batches)
        with _forward(setting, seed, number):
            output = ranks.forward(model, batch)
            part = ranks.part(model)
            part_report = compute(model, output, batch, counts, losses, setting.vocabulary, loads, part, contrast)
        part_report.objective.backward()
        report = report + part_report.detach()
        if output.routing is not None:
            routing = output.routing if routing is None else routing + output.routing
    norm, router_norms = ranks.finish_gradients(model)
    return StepGradients(ranks.sum_report(report), ranks.sum_routing(routing), loads, norm, router_norms)


def _contrast(
    model: MultimodalModel, batches: list[PackedBatch], setting: StepSetting, seed: int
) -> list[CachedInfoNCE]:
    """The first pass of two: the contrastive losses of all micro-batches and their gradients by embedding."""
    embedded = []
    part = setting.ranks.part(model)
    for number, batch in enumerate(batches):
        batch = batch.to(setting.device)
        with torch.no_grad(), _forward(setting, seed, number):
            hidden = setting.ranks.forward(model, batch).hidden
            pairs = part.own_pairs(batch.pairs)
            embedded.append(Embedded(*model.contrast(hidden, pairs, batch.modality), pairs))
    return cache(embedded, setting.config.losses.contrastive.tau, part.gather_pairs)


@contextmanager
def _forward(setting: StepSetting, seed: int, number: int) -> Iterator[None]:
    """Around the forward pass of a micro-batch, which draws the same numbers whenever it is run."""
    entropy = (seed, setting.ranks.replica * setting.micro_batches + number)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
    with setting.config.precision.autocast(setting.device):
        yield
