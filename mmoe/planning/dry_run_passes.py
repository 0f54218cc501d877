"""Counts what the parts of a step cost: its forward and backward passes one by one, and the whole step from them.

A dry step runs few micro-batches. Of the forward passes the last one stands for those that were not run, of the
backward passes the middle one: what is done once a step (FSDP keeps the root of a pipeline stage gathered, ZeRO-1
everything) is done in the first forward and the last backward pass, and of backward passes in a row each but the last
gathers a block for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmoe.losses.report import LossReport
from mmoe.models.decoder import ModelOutput, MultimodalModel
from mmoe.models.moe.balance import ExpertLoadAccumulator
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.parallel.mesh import Mesh
from mmoe.parallel.pipeline import StageModel
from mmoe.parallel.pipeline_schedule import Pipeline
from mmoe.parallel.ranks import MeshExecutor
from mmoe.parallel.setting import RankSetting
from mmoe.planning.communication_trace import CommunicationTrace
from mmoe.planning.communication_traffic import Traffic
from mmoe.planning.flops_count import FlopCount
from mmoe.schema.batch import PackedBatch

if TYPE_CHECKING:
    from mmoe.compat import FSDPMemTracker

DEVICE = torch.device("cpu")
BETWEEN_STAGES = ("send", "receive")


@dataclass
class Passes:
    """Splits into parts what is counted of a step: `mark` begins a part, `step` adds them up.

    A part stands for as many parts of the step, all alike, as `mark` is told.
    """

    run: int  # micro-batches of the dry step
    accumulation: int  # of a step
    trace: CommunicationTrace
    flops: FlopCount
    tracker: FSDPMemTracker
    root: nn.Module
    parts: list[tuple[int | None, Traffic, int]] = field(default_factory=list)
    _times: int | None = 1

    def forward(self, number: int) -> None:
        """Begin the part of the forward pass of micro-batch `number`; the last one stands for those not run."""
        self.mark(self.accumulation - self.run + 1 if number == self.run - 1 else 1)
        self.through_root()

    def through_root(self) -> None:
        """Let the memory tracker see another pass through the root: it refuses a second one of a root that it knows."""
        self.tracker.memory_tracking.pop(self.root, None)

    def backward(self, number: int) -> None:
        """Begin the part of the backward pass of micro-batch `number`; one of them stands for those not run."""
        self.mark(self.accumulation - self.run + 1 if number == (self.run - 1) // 2 else 1)

    def mark(self, times: int | None = None) -> None:
        """Begin a part that stands for `times` parts of a step, one in a micro-batch; None: it occurs once a step."""
        self.parts.append((self._times, self.trace.take(), self.flops.take()))
        self._times = times

    def activations(self) -> int:
        """Return the bytes of activations that are held now."""
        snapshot = self.tracker.get_tracker_snapshot().get(DEVICE, {})
        return sum(size for kind, size in snapshot.items() if "Activation" in str(kind))

    def step(self) -> tuple[Traffic, int]:
        """Return traffic and operations of a whole step.

        Traffic from stage to stage is the same for all micro-batches.
        """
        traffic, between, operations = Traffic(), Traffic(), 0
        for times, part, flops in self.parts:
            if times is None:
                traffic += part
            else:
                sent, rest = part.split(BETWEEN_STAGES)
                traffic, between = traffic + rest.times(times), between + sent
            operations += flops * (times or 1)
        return traffic + between.times(self.accumulation).over(self.run), operations


class DryRanks(MeshExecutor):
    """Executes a rank's passes and notes them."""

    def __init__(self, mesh: Mesh, setting: RankSetting, sources: int, model: MultimodalModel, passes: Passes) -> None:
        pipeline = DryPipeline(model, mesh, setting, passes) if isinstance(model, StageModel) else None
        super().__init__(mesh, setting, sources, DEVICE, pipeline)
        self.passes, self._forwards, self._backwards = passes, 0, 0

    def forward(self, model: MultimodalModel, batch: PackedBatch) -> ModelOutput:
        """Run the model forward as a part of its own."""
        self.passes.forward(self._forwards % self.passes.run)
        self._forwards += 1
        output = super().forward(model, batch)
        if output.hidden.requires_grad:
            output.hidden.register_hook(self._backward)
        return output

    def _backward(self, gradient: Tensor) -> None:
        """The heads' part of the backward pass, the same in every one, comes before."""
        self.passes.backward(self._backwards)
        self._backwards += 1

    def gather_pairs(self, rows: Tensor) -> tuple[Tensor, int]:
        """Gather the pairs' rows; of groups wider than a micro-step once a step, those of all its micro-batches.

        Micro-batches that are not run have the rows of those that are.
        """
        if not self.setting.needs_embedding_pass:
            return super().gather_pairs(rows)
        self.passes.mark()
        whole = torch.arange(len(rows) // self.passes.run * self.passes.accumulation) % max(len(rows), 1)
        return super().gather_pairs(rows[whole])

    def finish_gradients(self, model: MultimodalModel) -> tuple[Tensor, Tensor | None]:
        """End the last backward pass, and measure the gradients."""
        self.passes.mark()
        return super().finish_gradients(model)


class DryPipeline(Pipeline):
    """Runs a pipeline's passes and notes them."""

    def __init__(self, model: StageModel, mesh: Mesh, setting: RankSetting, passes: Passes) -> None:
        super().__init__(model, mesh, setting, DEVICE)
        self.passes, self._embedded, self._backwards = passes, 0, 0
        self.kept_by_pass = 0  # bytes of activations, by the last pass

    def run(self, *arguments: Any) -> tuple[LossReport, RoutingStatistics | None, ExpertLoadAccumulator]:
        """Run the micro-batches through the pipeline, noting each pass."""
        self.passes.mark(1)  # what is received before the first forward pass belongs to it
        return super().run(*arguments)

    def forward(self, stage: int, number: int, entering: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run a stage forward as a part of its own, and note the activations it keeps."""
        self.passes.forward(number)
        before = self.passes.activations()
        leaving = super().forward(stage, number, entering)
        self.kept_by_pass = self.passes.activations() - before
        return leaving

    def hidden(self, batch: PackedBatch) -> Tensor | None:
        """Embed a batch in the first of two passes, as a part of its own."""
        self.passes.forward(self._embedded)
        self._embedded += 1
        return super().hidden(batch)

    def _through(self, stage: int, batch: PackedBatch, x_BHD: Tensor | None) -> ModelOutput:
        self.passes.through_root()
        return super()._through(stage, batch, x_BHD)

    def before_backward(self) -> None:
        """Begin the part of a backward pass."""
        self.passes.backward(self._backwards // len(self.model.here))
        self._backwards += 1
        super().before_backward()

    def kept(self, micro_batches: int) -> int:
        """Count the passes through a stage whose activations are held at the same time in a step of `micro_batches`."""
        pp, each, rank = self.mesh.size("pp"), len(self.model.here), self.mesh.rank("pp")
        if each > 1:
            return min(2 * (pp - rank - 1) + (each - 1) * pp + 1, micro_batches * each)
        return min(pp - rank, micro_batches) if micro_batches >= pp else micro_batches
