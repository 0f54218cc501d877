"""Sends a step's micro-batches through the pipeline: 1F1B, or interleaved 1F1B (Narayanan et al. 2021).

From stage to stage go the hidden states and, with experts, one vector of router losses: every stage adds its own
layers' share of the means over all layers, so that the last stage has the whole objective and their gradient flows
back like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from mmoe.losses.report import LossReport
from mmoe.models.batch_context import BatchContext
from mmoe.models.decoder import ModelOutput, RouterTerms
from mmoe.models.moe.balance import BalanceConfig, ExpertLoadAccumulator, router_losses
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.parallel.collectives import all_reduce_no_grad
from mmoe.parallel.gradients import local
from mmoe.parallel.mesh import Mesh
from mmoe.parallel.parallelize import accumulate
from mmoe.parallel.pipeline import TIED, StageModel
from mmoe.parallel.sequence import Sharding
from mmoe.parallel.setting import RankSetting
from mmoe.schema.batch import PackedBatch

# The losses of a numbered micro-batch, given the model's output on it and the loads of the step before it.
Losses = Callable[[ModelOutput, PackedBatch, int, ExpertLoadAccumulator], LossReport]
PipelineSchedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B


@dataclass(frozen=True)
class PassedLosses:
    """Holds the router losses of all layers, as they came through the pipeline."""

    names: tuple[str, ...]
    values: Tensor

    def terms(self, loads: ExpertLoadAccumulator, config: BalanceConfig) -> dict[str, Tensor]:
        """Return the routers' losses by name; `loads` and `config` were read where the routers ran."""
        return dict(zip(self.names, self.values.unbind(), strict=True))


@dataclass
class _Step:
    """Holds what the passes of a step leave, by stage; `backwards` are still to come on this rank."""

    batches: list[PackedBatch]
    losses: Losses
    backwards: int
    loads: dict[int, ExpertLoadAccumulator]
    report: LossReport = field(default_factory=LossReport.zero)
    routing: dict[int, RoutingStatistics] = field(default_factory=dict)


class Pipeline:
    """Runs the stages of this rank, which take part in a step's micro-batches."""

    def __init__(self, model: StageModel, mesh: Mesh, setting: RankSetting, device: torch.device) -> None:
        self.model, self.mesh, self.setting, self.device = model, mesh, setting, device
        moe = setting.model.moe
        routed = [layer for layer in range(setting.model.n_layers) if moe is not None and moe.in_layer(layer)]
        here = {stage: [routed.index(n) for n in model.layers[stage] if n in routed] for stage in model.here}
        self.rows = [row for rows in here.values() for row in rows]  # of this rank's routers among all
        self._shares = {stage: len(rows) / max(len(routed), 1) for stage, rows in here.items()}
        self._names = router_losses(setting.losses.load_balance) if routed else ()
        self._step: _Step | None = None
        self._form: tuple[int, tuple[int, int]] | None = None  # micro-batches and shape that the schedule is for
        self._schedule: PipelineSchedule | None = None
        dist.barrier(mesh.group("pp"))  # the first exchange between two ranks alone may not open a group

    def run(
        self, batches: list[PackedBatch], losses: Losses
    ) -> tuple[LossReport, RoutingStatistics | None, ExpertLoadAccumulator]:
        """Compute the gradients of all micro-batches.

        Returns the report (zero but on the last stage), and the statistics and loads of this rank's layers.
        """
        here, form = self.model.here, (len(batches), batches[0].shape)
        if self._schedule is None or self._form != form:
            self._form, self._schedule = form, self._made(len(batches), batches[0])
        loads = {stage: ExpertLoadAccumulator(self._sum_over_data) for stage in here}
        self._step = step = _Step(batches, losses, len(here) * len(batches), loads)
        numbers = list(range(len(batches)))
        numbered = [{"number": number} for number in numbers]
        self._schedule.step(kwarg_mbs=numbered, target_mbs=numbers, return_outputs=False)
        self._step = None
        routing = [step.routing[stage] for stage in here if stage in step.routing]
        return (
            step.report,
            RoutingStatistics.stack(routing) if routing else None,
            ExpertLoadAccumulator.join(list(loads.values())),
        )

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> Tensor | None:
        """Compute hidden states [B, L, D] after the last norm, without gradient.

        They are on the ranks of the last stage; the others get None. B sequences, L positions, D model width.
        """
        group, pp = self.mesh.group("pp"), self.mesh.size("pp")
        sending: list[dist.Work | None] = []
        x: Tensor | None = None
        for stage in self.model.here:
            if stage > 0:
                x = self._border(batch, self.device)[0]
                dist.recv(x, group=group, group_src=(stage - 1) % pp)
            with self._autocast():
                x = self._through(stage, batch, x).hidden.contiguous()
            if not self.model.is_last(stage):
                sending.append(dist.isend(x, group=group, group_dst=(stage + 1) % pp))
        for work in sending:
            assert work is not None  # this rank is in the group
            work.wait()
        return x if self.model.is_last(stage) else None

    def table(self) -> Table:
        """Make the table of the stages, to be printed at the start of a run."""
        return self.model.table(self.mesh.size("pp"), self.setting.batch.accumulation)

    def counted(self) -> list[nn.Parameter]:
        """Return the parameters here without the copy of another stage's."""
        return [parameter for name, parameter in self.model.named_parameters() if name != self.model.copy]

    def sum_tied(self) -> None:
        """Add up the gradients of the token table and of its copy on the last stage, for both of them."""
        ranks = self.mesh.size("pp")
        partner = {0: ranks - 1, ranks - 1: 0}.get(self.mesh.rank("pp"))
        if not self.model.tied or partner is None:
            return
        gradient = self.model.get_parameter(TIED).grad
        assert gradient is not None  # ids are read from it, and labels with it
        own = local(gradient).contiguous()
        other, group = torch.empty_like(own), self.mesh.group("pp")
        exchange = (dist.isend, own), (dist.irecv, other)
        both = [dist.P2POp(call, tensor, group=group, group_peer=partner) for call, tensor in exchange]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        local(gradient).add_(other)

    def before_backward(self) -> None:
        """Keep what the heads share gathered for the step: they are used before and after a stage's own passes."""
        step = self._current
        step.backwards -= 1
        last = step.backwards == 0
        assert isinstance(self.model, FSDPModule)  # `parallelize` has made it one
        accumulate(self.model, self.setting.parallel, last)
        self.model.set_reshard_after_backward(last, recurse=False)
        self.model.set_is_last_backward(last)

    def _made(self, micro_batches: int, batch: PackedBatch) -> PipelineSchedule:
        border = self._border(batch, torch.device("meta"))
        for tensor in border:
            tensor.requires_grad_()
        stages = [_Stage(self, number, border) for number in self.model.here]
        if len(stages) > 1:
            return ScheduleInterleaved1F1B([*stages], micro_batches, self._losses, scale_grads=False)
        # With fewer micro-batches than stages nothing is steady: all forward passes come before all backward passes.
        kind = Schedule1F1B if micro_batches >= len(self.model.layers) else ScheduleGPipe
        return kind(stages[0], micro_batches, self._losses, scale_grads=False)

    def _border(self, batch: PackedBatch, device: torch.device) -> tuple[Tensor, ...]:
        """Make empty tensors of what goes from a stage to the next: hidden states, router losses."""
        sequences, length = batch.shape
        dtype = self.setting.precision.parameter_dtype
        shape = sequences, length // self.mesh.dims.sequence_ranks, self.setting.model.d_model
        hidden = torch.empty(shape, dtype=dtype, device=device)
        return (hidden, torch.empty(len(self._names), dtype=dtype, device=device)) if self._names else (hidden,)

    def forward(self, stage: int, number: int, entering: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run one stage on one micro-batch, as the schedule asks."""
        step = self._current
        with self._autocast():
            output = self._through(stage, step.batches[number], entering[0] if entering else None)
            leaving = [output.hidden.contiguous()]
            if self._names:
                passed = entering[1] if entering else self._border(step.batches[number], self.device)[1].zero_()
                leaving.append(self._added(passed, stage, output.auxiliary))
        if output.routing is not None:
            before = step.routing.get(stage)
            step.routing[stage] = output.routing if before is None else before + output.routing
        return tuple(leaving)

    def _through(self, stage: int, batch: PackedBatch, x_BHD: Tensor | None) -> ModelOutput:
        """Run `stage` of the model on the positions here; after the last one the hidden states are whole."""
        config, dtype = self.setting.model, self.setting.precision.parameter_dtype
        if self.mesh.dims.sequence_ranks == 1:
            return self.model(stage, BatchContext.from_batch(batch, config, dtype), batch if x_BHD is None else x_BHD)
        sharding = Sharding.from_batch(batch, self.mesh)
        entering = sharding.local(batch) if x_BHD is None else x_BHD
        output = self.model(stage, sharding.context(batch, config, dtype), entering)
        return replace(output, hidden=sharding.whole(output.hidden)) if self.model.is_last(stage) else output

    def _added(self, passed: Tensor, stage: int, own: RouterTerms | None) -> Tensor:
        """Add the router losses of this stage's layers to those so far."""
        if own is None:
            return passed.clone()
        terms = own.terms(self._current.loads[stage], self.setting.losses.load_balance)
        return passed + self._shares[stage] * torch.stack([terms[name] for name in self._names])

    def _losses(self, leaving: tuple[Tensor, ...], number: int) -> Tensor:
        """Compute the objective of a micro-batch, on the last stage."""
        step = self._current
        passed = PassedLosses(self._names, leaving[1]) if self._names else None
        last = self.model.here[-1]
        with self._autocast():
            output = ModelOutput(leaving[0], passed, None)
            report = step.losses(output, step.batches[number], number, step.loads[last])
        step.report = step.report + report.detach()
        return report.loss_for_backward

    @property
    def _current(self) -> _Step:
        assert self._step is not None  # torch's schedule calls back within `run` alone
        return self._step

    def _autocast(self) -> AbstractContextManager:
        return self.setting.precision.autocast(self.device)

    def _sum_over_data(self, x: Tensor) -> Tensor:
        return all_reduce_no_grad(x, self.mesh.group("data"))


class _Stage(PipelineStage):
    """Runs one stage for torch's schedules; FSDP2 stays out of their sight: it accumulates as in every other layout."""

    def __init__(self, pipeline: Pipeline, number: int, border: tuple[Tensor, ...]) -> None:
        self.pipeline, stages = pipeline, len(pipeline.model.layers)
        entering = border if number else ()
        group = pipeline.mesh.group("pp")
        super().__init__(_Calls(pipeline, number), number, stages, pipeline.device, entering, border, group=group)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        self.pipeline.before_backward()
        super().backward_one_chunk(bwd_chunk_id, *arguments, **options)


class _Calls(nn.Module):
    """Wraps a stage of `pipeline` as the module that `PipelineStage` wants."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._forward = partial(pipeline.forward, stage)

    def forward(self, *entering: Tensor, number: int) -> tuple[Tensor, ...]:
        return self._forward(number, entering)
