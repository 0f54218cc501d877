"""One optimizer step on random packed multimodal documents, in any layout: what the layouts are compared by."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmoe.config.load import validate
from mmoe.data.batch import PackedBatch
from mmoe.data.deal import deal
from mmoe.data.sample import Modality
from mmoe.losses.total import LossConfig, PlannedCounts
from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.materialise import materialise
from mmoe.parallel.mesh import Degrees, Mesh
from mmoe.parallel.parallelize import check_layout, parallelize
from mmoe.parallel.ranks import ManyRanks, OneProcess
from mmoe.precision.config import PrecisionConfig
from mmoe.training.gradients import StepGradients, StepSetting, step_gradients
from tests.models.random_batch import INPUTS, VOCABULARY, pack, random_sequences

SEQUENCES = 4
MODEL: dict[str, Any] = {
    "d_model": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 48,
    "qk_norm": True,
    "bidirectional_slices": True,
    "moe": {"experts": 4, "top_k": 2, "hidden": 32, "shared_experts": 1, "every": 2},
}
LOSSES: dict[str, Any] = {"contrastive": {"weight": 0.3}, "action": {"weight": 0.7}, "balance": {"sequence": 0.05}}


@dataclass(frozen=True)
class Case:
    """A step: `micro` sequences a micro-batch; keys of `model` and `losses` replace those above."""

    compute: str = "float64"
    micro: int = 1
    model: dict[str, Any] | None = None
    losses: dict[str, Any] | None = None
    parallel: dict[str, Any] | None = None


def config_of(case: Case, replicas: int) -> SimpleNamespace:
    """The parts of a RunConfig that a step reads."""
    losses = validate(LossConfig, {**LOSSES, **(case.losses or {})}, "case")
    moe = {**MODEL["moe"], **(case.model or {}).get("moe", {})}
    if case.compute == "float64":
        moe["engine"] = "loop"
    model = validate(ModelConfig, {**MODEL, **(case.model or {}), "moe": moe}, "case")
    group = losses.contrastive.group_sequences or SEQUENCES
    batch = SimpleNamespace(
        sequences=SEQUENCES, micro_batch_sequences=case.micro, accumulation=SEQUENCES // (case.micro * replicas)
    )
    return SimpleNamespace(
        model=model,
        losses=losses,
        contrastive_group=group,
        precision=PrecisionConfig(compute=case.compute),
        parallel=validate(ParallelConfig, case.parallel or {}, "case"),
        batch_of=lambda replicas: batch,
    )


def batches_of(case: Case, group: int, replica: int, replicas: int) -> tuple[list[PackedBatch], PlannedCounts]:
    """The micro-batches of a replica, and the counts of the whole step."""
    sequences = random_sequences(3, SEQUENCES, 4)
    longest = max(sum(map(len, sequence)) for sequence in sequences) + 5
    length = -(-longest // 32) * 32
    whole = pack(sequences, length)
    labels = np.bincount(VOCABULARY.modality_of(whole.labels[whole.labels >= 0].numpy()), minlength=len(Modality))
    planned = SimpleNamespace(labels=labels, action_elements=int(whole.action_mask.sum()), pairs=len(whole.pairs.group))
    losses = config_of(case, replicas).losses
    counts = PlannedCounts.of(planned, losses, SEQUENCES)
    costs = np.arange(SEQUENCES)
    mine = deal(costs, group, case.micro, replicas)[replica].tolist()
    batches = []
    for first in range(0, len(mine), case.micro):
        chosen = mine[first : first + case.micro]
        batch = pack([sequences[number] for number in chosen], length)
        start = batch.pairs.span[:, 0, 0]
        number = torch.tensor(chosen)[start // length]
        pairs = replace(batch.pairs, text_hash=number * length + start % length, group=number // group)
        batches.append(replace(batch, pairs=pairs))
    return batches, counts


def run_step(case: Case, world: int) -> dict[str, Any]:
    """Loss, norm, terms, and every gradient by name, whole."""
    device, config = torch.device("cpu"), config_of(case, 1)
    ranks: Any = OneProcess()
    if world > 1:
        degrees = Degrees.of(config.parallel, world)
        config = config_of(case, degrees.replicas)
        check_layout(config.model, degrees)
        mesh = Mesh(degrees)
        ranks = ManyRanks(mesh, config, 3, device)
        with torch.device("meta"):
            model = MultimodalModel(config.model, INPUTS)
        model.to(config.precision.parameter_dtype)
        parallelize(model, mesh, config.parallel, config.precision)
        materialise(model, 7, config.model.init_std, config.model.layers, device)
    else:
        model = config.model.build(INPUTS, 7).to(config.precision.parameter_dtype)
    model.train()
    batches, counts = batches_of(case, config.contrastive_group, ranks.replica, ranks.replicas)
    step = step_gradients(model, batches, counts, StepSetting.of(config, VOCABULARY, device, ranks), seed=11)
    return summary(model, step)


def summary(model: MultimodalModel, step: StepGradients) -> dict[str, Any]:
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": float(step.report.total),
        "norm": float(step.norm),
        "terms": {name: float(value) for name, value in step.report.terms.items()},
        "events": {name: float(value) for name, value in step.report.events.items()},
        "items": {name: value.tolist() for name, value in step.report.items.items()},
        "load": step.routing.load_NMSE.tolist(),
        "drops": step.routing.drops_NMSE.tolist(),
        "router_norms": step.router_norms_NE.tolist(),
        "gradients": {name: value.numpy() for name, value in gradients.items()},
    }


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()
