"""Runs this process among the ranks of a run: what it does of a step, and what it must add up with the others.

`LocalExecutor` is the run without others. Both have the same methods, so that the loop reads the same.
Shape suffixes: B sequences, L positions, D model width, n chosen positions, V ids; N layers of experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from mmoe.data.load.stream import StepData, Stream
from mmoe.data.plan.assignment import ContrastiveScope
from mmoe.losses.loss_share import FULL_SHARE, LossShare
from mmoe.losses.report import LossReport
from mmoe.models.decoder import ModelOutput, MultimodalModel
from mmoe.models.moe.statistics import RoutingStatistics, router_gradient_norms
from mmoe.optim.adamw import gradient_norm
from mmoe.parallel.broadcast import decodes, shared_batches, shared_steps
from mmoe.parallel.collectives import all_gather_no_grad, all_gather_scatter_grad, all_reduce_no_grad
from mmoe.parallel.gradients import sum_over_tensor_ranks, total_norms
from mmoe.parallel.mesh import Mesh
from mmoe.parallel.parallelize import accumulate
from mmoe.parallel.pipeline_schedule import Pipeline
from mmoe.parallel.reports import sum_report, sum_routing
from mmoe.parallel.sequence import Sharding
from mmoe.parallel.setting import RankSetting
from mmoe.parallel.tensor import VocabularyHead
from mmoe.schema.batch import PackedBatch


class SharedBatches(Protocol):
    """Deals batches to data replicas, as many and as large for each of them."""

    def __len__(self) -> int:
        """Count the batches that hold something."""

    def share(self, replica: int, replicas: int) -> Iterator[PackedBatch]:
        """Give the batches of a replica: ``replica``, ``replica + replicas``, ..., the last one perhaps empty."""


class StepExecutor(Protocol):
    """Says what a step, and a measure, asks of the ranks."""

    replica: int
    replicas: int
    first: bool  # whether this rank writes the run's files
    speaks: bool  # whether it is the one of its replica that tells what was measured: it has the heads
    pipeline: Pipeline | None  # what takes the place of `forward` and of a loop over micro-batches

    def tables(self) -> list[Table]:
        """Return the tables to be printed at the start of a run."""

    def parameters(self, model: MultimodalModel) -> int:
        """Count the parameters of the whole model."""

    def steps(self, stream: Stream, micro_batches: int) -> Iterator[StepData]:
        """Yield the steps of this rank's replica, each of so many micro-batches."""

    def batches(self, batches: SharedBatches) -> Iterator[PackedBatch]:
        """Yield this replica's share of the batches, the same on all of its ranks; each replica has as many."""

    def forward(self, model: MultimodalModel, batch: PackedBatch) -> ModelOutput:
        """Run the model on the batch, and return the output of the whole batch."""

    def hidden(self, model: MultimodalModel, batch: PackedBatch) -> Tensor | None:
        """Compute hidden states [B, L, D] of the whole batch, for no gradient; None on ranks without the heads."""

    def logits(self, model: MultimodalModel, hidden_nD: Tensor) -> Tensor:
        """Compute scores [n, V] of all ids, for no gradient; the ranks that share the vocabulary ask together."""

    def part(self, model: MultimodalModel) -> LossShare:
        """Say which share of its batches' losses this rank computes."""

    def before_backward(self, model: MultimodalModel, last: bool) -> None:
        """Prepare the backward pass of a micro-batch, the `last` one of its step or not."""

    def finish_gradients(self, model: MultimodalModel) -> tuple[Tensor, Tensor | None]:
        """Return the norm of all gradients, and that of each expert's router weights [N, E].

        It is called after the last backward pass of a step.
        """

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sum `x` over the data replicas into a new tensor."""

    def sum_report(self, report: LossReport) -> LossReport:
        """Add up the reports of all ranks."""

    def sum_routing(self, routing: RoutingStatistics | None) -> RoutingStatistics | None:
        """Add up the statistics of all ranks, a row for each layer of experts of the whole model."""


class LocalExecutor:
    """Runs the steps of a run that has one process."""

    replica, replicas, first, speaks = 0, 1, True, True
    pipeline: Pipeline | None = None

    def tables(self) -> list[Table]:
        """Give none: nothing is spread."""
        return []

    def parameters(self, model: MultimodalModel) -> int:
        """Count the parameters of the model."""
        return sum(p.numel() for p in model.parameters())

    def steps(self, stream: Stream, micro_batches: int) -> Iterator[StepData]:
        """Give the steps of the stream as they are."""
        return stream.steps()

    def batches(self, batches: SharedBatches) -> Iterator[PackedBatch]:
        """Give all of the batches."""
        return batches.share(0, 1)

    def forward(self, model: MultimodalModel, batch: PackedBatch) -> ModelOutput:
        """Run the model on the whole batch."""
        return model(batch)

    def hidden(self, model: MultimodalModel, batch: PackedBatch) -> Tensor | None:
        """Run the model on the whole batch."""
        return model(batch).hidden

    def logits(self, model: MultimodalModel, hidden_nD: Tensor) -> Tensor:
        """Give the model's own scores."""
        return model.logits(hidden_nD)

    def part(self, model: MultimodalModel) -> LossShare:
        """Return the share that is all of the losses."""
        return FULL_SHARE

    def before_backward(self, model: MultimodalModel, last: bool) -> None:
        """Do nothing: no gradient travels."""

    def finish_gradients(self, model: MultimodalModel) -> tuple[Tensor, Tensor | None]:
        """Measure the gradients and those of the routers."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return gradient_norm(gradients), router_gradient_norms(model.decoder.routers)

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Give `x` as it is."""
        return x

    def sum_report(self, report: LossReport) -> LossReport:
        """Give the report as it is."""
        return report

    def sum_routing(self, routing: RoutingStatistics | None) -> RoutingStatistics | None:
        """Give the statistics as they are."""
        return routing


class MeshExecutor:
    """Runs the steps of a run on one of the ranks of `mesh`."""

    def __init__(
        self, mesh: Mesh, setting: RankSetting, sources: int, device: torch.device, pipeline: Pipeline | None = None
    ) -> None:
        self.mesh, self.setting, self.sources, self.device, self.pipeline = mesh, setting, sources, device, pipeline
        self.replica, self.replicas = mesh.replica, mesh.replicas
        self.first = dist.get_rank() == 0
        self.speaks = mesh.rank("sequence") == 0 and mesh.rank("pp") == mesh.dims.pp - 1
        self.contrast_axis = self._contrast_axis()

    def tables(self) -> list[Table]:
        """Give the table of the axes, and that of the pipeline."""
        return [self.mesh.dims.table(), *([self.pipeline.table()] if self.pipeline else [])]

    def parameters(self, model: MultimodalModel) -> int:
        """Count the parameters of the whole model; all ranks ask."""
        if self.pipeline is None:
            return sum(p.numel() for p in model.parameters())
        here = torch.tensor(sum(p.numel() for p in self.pipeline.counted()))
        return int(all_reduce_no_grad(here, self.mesh.group("pp")))

    def steps(self, stream: Stream, micro_batches: int) -> Iterator[StepData]:
        """Give the steps that one rank of each replica decodes and shares with its peers."""
        return shared_steps(stream, self.mesh, micro_batches, self.device)

    def forward(self, model: MultimodalModel, batch: PackedBatch) -> ModelOutput:
        """Run the model on the positions of this rank, and gather the hidden states of all."""
        if self.mesh.dims.sequence_ranks == 1:
            return model(batch)
        sharding = Sharding.from_batch(batch, self.mesh)
        context = sharding.context(batch, model.decoder.config, self.setting.precision.parameter_dtype)
        output = model(sharding.local(batch), context)
        return replace(output, hidden=sharding.whole(output.hidden))

    def batches(self, batches: SharedBatches) -> Iterator[PackedBatch]:
        """Give the batches that one rank of each replica decodes and shares with its peers."""
        mine = batches.share(self.replica, self.replicas) if decodes(self.mesh) else iter(())
        return shared_batches(mine, self.mesh, -(-len(batches) // self.replicas), self.device)

    def hidden(self, model: MultimodalModel, batch: PackedBatch) -> Tensor | None:
        """Run the model on the batch, through the pipeline where there is one."""
        return self.pipeline.hidden(batch) if self.pipeline else self.forward(model, batch).hidden

    def logits(self, model: MultimodalModel, hidden_nD: Tensor) -> Tensor:
        """Gather the scores of the ids that each rank of tp has."""
        if self.mesh.dims.tp == 1:
            return model.logits(hidden_nD)
        head = VocabularyHead(model, self.mesh.axis("tp"))
        return head.whole(head.logits(hidden_nD))

    def part(self, model: MultimodalModel) -> LossShare:
        """Say which share of its batches' losses this rank computes, by the axes of the mesh."""
        mesh, dims = self.mesh, self.mesh.dims
        vocabulary: dict[str, Any] = {}
        if dims.tp > 1:
            head = VocabularyHead(model, mesh.axis("tp"))
            vocabulary = {"head": head.logits, "criterion": head.criterion}
        return LossShare(
            labels=(mesh.rank("cp"), dims.cp),
            items=(mesh.rank("sequence"), dims.sequence_ranks),
            reports_labels=mesh.rank("tp") == 0,
            reports_routing=mesh.rank("sequence") == 0,
            gather_pairs=self.gather_pairs if self.contrast_axis else None,
            **vocabulary,
        )

    def gather_pairs(self, rows: Tensor) -> tuple[Tensor, int]:
        """Gather the rows of all ranks that may share a contrastive group, and say where this rank's begin.

        `rows`: [P, ...], of the P pairs of this rank.
        """
        assert self.contrast_axis is not None  # `part` asks for pairs where there is one
        group, rank = self.mesh.group(self.contrast_axis), self.mesh.rank(self.contrast_axis)
        counts = all_gather_no_grad(torch.tensor([len(rows)], device=rows.device), group).flatten().tolist()
        padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        parts = all_gather_scatter_grad(padded, group)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]), sum(counts[:rank])

    def _contrast_axis(self) -> str | None:
        if self.setting.scope is not ContrastiveScope.MICRO_BATCH:
            return "loss"
        return "sequence" if self.mesh.dims.sequence_ranks > 1 else None

    def before_backward(self, model: MultimodalModel, last: bool) -> None:
        """Let gradients travel, with ZeRO-1, in the `last` backward pass of a step alone."""
        accumulate(model, self.setting.parallel, last)

    def finish_gradients(self, model: MultimodalModel) -> tuple[Tensor, Tensor | None]:
        """Add up the gradients of copies, and measure those of the whole model."""
        parameters = list(model.parameters())
        if self.pipeline is not None:
            self.pipeline.sum_tied()
            parameters = self.pipeline.counted()
        sum_over_tensor_ranks(model, self.mesh)
        shape = self._routers()
        norm, rows_NE = total_norms(parameters, model.decoder.routers, self._rows(), shape, self.mesh, self.device)
        return norm, rows_NE if shape[0] else None

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Add up `x` of all data replicas."""
        return all_reduce_no_grad(x, self.mesh.group("data"))

    def sum_report(self, report: LossReport) -> LossReport:
        """Add up the reports of all ranks."""
        return sum_report(report, self.setting.loss_terms, self.sources, self.device)

    def sum_routing(self, routing: RoutingStatistics | None) -> RoutingStatistics | None:
        """Add up the statistics of all ranks; None for a dense model."""
        layers, experts = self._routers()
        if not layers:
            return None
        counts = self.mesh.rank("sequence") == 0
        return sum_routing(routing, (layers, self.sources, experts), self._rows(), counts, self.device)

    def _rows(self) -> list[int]:
        """Give the numbers of the routers here among those of the whole model."""
        return list(range(self._routers()[0])) if self.pipeline is None else self.pipeline.rows

    def _routers(self) -> tuple[int, int]:
        """Count the layers of experts of the whole model, and the experts of each."""
        model = self.setting.model
        if model.moe is None:
            return 0, 0
        return sum(map(model.moe.in_layer, range(model.n_layers))), model.moe.n_experts
