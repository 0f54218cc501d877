"""Runs one rank's part of an optimizer step of a mesh that is not there: the code of a real step, without contents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmoe.compat import FakeTensorMode, fake_rank, memory_tracker, pad_shards, shapes_apart, tree_leaves
from mmoe.models.decoder import MultimodalModel
from mmoe.optim.config import OptimConfig
from mmoe.optim.optimizer import build_optimizer
from mmoe.parallel.gradients import local
from mmoe.parallel.mesh import Mesh
from mmoe.parallel.parallelize import parallelize
from mmoe.parallel.pipeline import on_meta
from mmoe.parallel.setting import RankSetting
from mmoe.planning.communication_trace import CommunicationTrace
from mmoe.planning.communication_traffic import Traffic
from mmoe.planning.dry_run_batch import Assumed, Documents
from mmoe.planning.dry_run_fake import DryMode
from mmoe.planning.dry_run_passes import DEVICE, DryPipeline, DryRanks, Passes
from mmoe.planning.dry_run_routing import Load, plan_routing
from mmoe.planning.flops_count import FlopCount
from mmoe.training.gradients import StepSetting, step_gradients

KINDS = {
    "Sharded Param": "weights",
    "Unsharded Param": "gathered weights",
    "Buffer": "weights",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gathered gradients",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "activations",
    "All Gather": "communication",
    "Reduce Scatter": "communication",
}


@dataclass(frozen=True)
class RankCost:
    """Says what one rank holds and does in an optimizer step.

    `memory`, in bytes, is that of the step's peak by kind; `kept` passes through a stage have activations then.
    `traffic` and `flops` (of matrix products and attention) are of the whole step of `micro_batches`.
    """

    rank: int
    stage: int
    parameters: int
    memory: dict[str, int]
    kept: int
    traffic: Traffic
    flops: int
    micro_batches: int


def dry_run(
    run: RankSetting, optim: OptimConfig, rank: int, assumed: Assumed, documents: Documents, load: Load
) -> RankCost:
    """Find the cost of `rank` in one step of `run`. Raises ConfigError where the model cannot be spread so."""
    with fake_rank(rank, run.dims.world):
        mesh = Mesh(run.dims)
        model = on_meta(run, assumed.inputs, mesh.rank("pp"))
        parallelize(model, mesh, run.parallel, run.precision)
        if run.model.moe is not None:
            slots = documents.sequences * documents.length // run.dims.sequence_ranks * run.model.moe.top_k
            plan_routing(model, load, slots)
        with FakeTensorMode(allow_non_fake_inputs=True), shapes_apart():
            model.to_empty(device=DEVICE)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    pad_shards(module)  # which the tracker would take for activations later
            return _step(run, optim, mesh, model, assumed, documents)


def _step(
    run: RankSetting, optim: OptimConfig, mesh: Mesh, model: MultimodalModel, assumed: Assumed, documents: Documents
) -> RankCost:
    optimizer = build_optimizer(model, optim.optimizer, optim.matrices)
    with DryMode():
        batch = documents.batch(assumed)
    denominators = run.loss_terms.denominators(documents.counts(run.batch.sequences, assumed), run.batch.sequences)
    accumulation = run.batch.accumulation
    # The first and the last micro-batch differ from the others with ZeRO-1, and in a pipeline each backward pass knows
    # whether another one follows (`Passes`).
    micro_batches = min(accumulation, 3 if mesh.dims.pp > 1 else 2 if run.parallel.zero == 1 else 1)
    if accumulation > 1 and run.parallel.zero > 1:
        for parameter in model.parameters():  # what the micro-batches before have left
            parameter.grad = torch.zeros_like(parameter)
    tracker, trace, flops = memory_tracker(model), CommunicationTrace(mesh), FlopCount()
    passes = Passes(micro_batches, accumulation, trace, flops, tracker, model)
    with tracker, DryMode(trace.note, flops.note):
        tracker.track_inputs(tuple(tree_leaves(vars(batch))))
        ranks = DryRanks(mesh, run, assumed.sources, model, passes)
        setting = replace(StepSetting.from_run(run, assumed.vocabulary, DEVICE, ranks), micro_batches=micro_batches)
        model.train()
        step_gradients(model, [batch] * micro_batches, denominators, setting, seed=0)
        passes.mark()
    memory = _by_kind(tracker.get_tracker_snapshot("peak")[DEVICE])
    kept = 1
    if isinstance(ranks.pipeline, DryPipeline):
        kept = ranks.pipeline.kept(accumulation)
        memory["activations"] += (kept - ranks.pipeline.kept(micro_batches)) * ranks.pipeline.kept_by_pass
    memory["optimizer"] = sum(_size(x) for x in tree_leaves([*optimizer.state.values()]) if isinstance(x, Tensor))
    traffic, operations = passes.step()
    return RankCost(
        rank=torch.distributed.get_rank(),
        stage=mesh.rank("pp"),
        parameters=sum(local(p).numel() for p in model.parameters()),
        memory=memory,
        kept=kept,
        traffic=traffic,
        flops=operations,
        micro_batches=accumulation,
    )


def _by_kind(snapshot: dict[Any, int]) -> dict[str, int]:
    kinds = dict.fromkeys(KINDS.values(), 0)
    for kind, size in snapshot.items():
        name = getattr(kind, "value", kind)
        if name in KINDS:
            kinds[KINDS[name]] += size
    return kinds


def _size(x: Tensor) -> int:
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.numel() * x.element_size()
