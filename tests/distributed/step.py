"""One optimizer step on random packed multimodal documents, in any layout: what the layouts are compared by."""

import functools
import importlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmoe.config.load import validate
from mmoe.data.plan.assignment import ContrastiveScope, assign_to_replicas
from mmoe.losses.config import LossConfig
from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.balance import update_expert_bias
from mmoe.optim.adamw import AdamWConfig, ClipConfig, clip_gradients
from mmoe.optim.batch import BatchArithmetic
from mmoe.optim.muon import MuonConfig
from mmoe.optim.optimizer import build_optimizer
from mmoe.parallel.build import build_spread
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import Mesh, ParallelDims
from mmoe.parallel.parallelize import check_layout
from mmoe.parallel.pipeline import check_pipeline_stages
from mmoe.parallel.ranks import LocalExecutor
from mmoe.parallel.setting import RankSetting
from mmoe.precision.config import PrecisionConfig
from mmoe.schema.batch import PackedBatch
from mmoe.schema.counts import ACTION_ELEMENTS, PAIRS, Counts, labels, zeros
from mmoe.schema.modality import Modality
from mmoe.training.gradients import StepGradients, StepSetting, step_gradients
from tests.models.random_batch import INPUTS, VOCABULARY, pack, random_document, random_sequences

MODEL: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "intermediate_size": 48,
    "qk_norm": True,
    "bidirectional_slices": True,
    "moe": {
        "n_experts": 4,
        "top_k": 2,
        "intermediate_size": 32,
        "n_shared_experts": 1,
        "layer_freq": 2,
        "router_noise": 0.3,
    },
}
LENGTH = 32  # of a sequence, for arithmetic; batches are as long as their documents make them
# The documents of poor sequences; two kinds joined by + are the sides of a pair.
POOR = {
    "text": ["text", "text", "text"],
    "short": ["text"],
    "nothing": [],
    "no images": ["audio+text", "audio"],
    "no audio": ["image+text", "image"],
    "no actions": ["image+text", "audio+text"],
    "no pairs": ["image", "audio", "clip"],
}
LOSSES: dict[str, Any] = {"contrastive": {"weight": 0.3}, "action": {"weight": 0.7}, "load_balance": {"sequence": 0.05}}


@dataclass(frozen=True)
class Case:
    """A step of `sequences`, `micro` of them a micro-batch; keys of `model` and `losses` replace those above.

    `extension` is a module that registers what the case names by kind. The table of token vectors has `spare_ids` more
    rows than there are ids. The sequences named in `poor` hold what `POOR` says.
    """

    compute: str = "float64"
    extension: str = ""
    micro: int = 1
    sequences: int = 4
    spare_ids: int = 0
    poor: dict[int, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> ModelInputs:
        return replace(INPUTS, vocabulary_size=INPUTS.vocabulary_size + self.spare_ids)


def setting_of(case: Case, world: int) -> RankSetting:
    """What the ranks of a step read; a single process has no degrees."""
    if case.extension:
        importlib.import_module(case.extension)
    losses = validate(LossConfig, {**LOSSES, **case.losses}, "case")
    changed = case.model.get("moe", {})
    moe = None if changed is None else {**MODEL["moe"], **changed}
    if moe and case.compute == "float64":
        moe.setdefault("expert_backend", "loop")
    model = validate(ModelConfig, {**MODEL, **case.model, "moe": moe}, "case")
    parallel = validate(ParallelConfig, case.parallel, "case")
    dims = ParallelDims.from_config(parallel, world) if world > 1 else ParallelDims()
    accumulation = case.sequences // (case.micro * dims.replicas)
    batch = BatchArithmetic(LENGTH, case.micro, accumulation, dims.replicas, LENGTH * case.sequences)
    scope = ContrastiveScope.narrowest(group_of(case, losses), case.micro, dims.replicas)
    return RankSetting(model, losses, parallel, PrecisionConfig(compute=case.compute), dims, batch, scope)


def group_of(case: Case, losses: LossConfig) -> int:
    """Sequences of a contrastive group."""
    return losses.contrastive.group_sequences or case.sequences


def batches_of(
    case: Case, losses: LossConfig, replica: int, replicas: int, seed: int = 3
) -> tuple[list[PackedBatch], dict[str, float]]:
    """The micro-batches of a replica, and the denominators of the whole step."""
    sequences = random_sequences(seed, case.sequences, 4)
    for number, kind in case.poor.items():
        rng = np.random.default_rng(number)
        sequences[number] = [
            random_document(rng, side, pair if "+" in document else -1)
            for pair, document in enumerate(POOR[kind])
            for side in document.split("+")
        ]
    longest = max(sum(map(len, sequence)) for sequence in sequences) + 5
    length = -(-longest // 32) * 32
    whole = pack(sequences, length)
    found = np.bincount(VOCABULARY.modality_of(whole.labels[whole.labels >= 0].numpy()), minlength=len(Modality))
    columns = zeros()
    columns[labels()] = found
    columns[[ACTION_ELEMENTS, PAIRS]] = int(whole.action_mask.sum()), len(whole.pairs.group)
    denominators = losses.build().denominators(Counts(columns), case.sequences)
    costs, group = np.arange(case.sequences)[:, None], group_of(case, losses)
    mine = assign_to_replicas(costs, group, case.micro, replicas)[replica].tolist()
    batches = []
    for first in range(0, len(mine), case.micro):
        chosen = mine[first : first + case.micro]
        batch = pack([sequences[number] for number in chosen], length)
        start = batch.pairs.span[:, 0, 0]
        number = torch.tensor(chosen)[start // length]
        pairs = replace(batch.pairs, text_hash=number * length + start % length, group=number // group)
        batches.append(replace(batch, pairs=pairs))
    return batches, denominators


@functools.cache
def mesh_of(dims: ParallelDims) -> Mesh:
    """Once in a process: to make its groups takes longer than a step."""
    return Mesh(dims)


@dataclass(frozen=True)
class Worker:
    """A rank of a case, with its part of the model; all weights are a function of their names."""

    case: Case
    setting: StepSetting
    model: MultimodalModel

    @classmethod
    def of(cls, case: Case, world: int) -> "Worker":
        device, run = torch.device("cpu"), setting_of(case, world)
        ranks: Any = LocalExecutor()
        if world > 1:
            check_layout(run.model, run.dims)
            check_pipeline_stages(run.model.n_layers, run.parallel.stages_per_rank, run.dims.pp, run.batch.accumulation)
            model, ranks = build_spread(run, case.inputs, 3, 7, mesh_of(run.dims), device)
        else:
            model = run.model.build(case.inputs, 7, run.heads(case.inputs)).to(run.precision.parameter_dtype)
        return cls(case, StepSetting.from_run(run, VOCABULARY, device, ranks), model.train())

    def gradients(self, seed: int = 3) -> StepGradients:
        ranks = self.setting.ranks
        batches, denominators = batches_of(
            self.case, setting_of(self.case, 1).losses, ranks.replica, ranks.replicas, seed
        )
        return step_gradients(self.model, batches, denominators, self.setting, seed=11)

    @property
    def routers(self) -> list[int]:
        """The layers of experts here, by their numbers among all."""
        pipeline = self.setting.ranks.pipeline
        return list(range(len(self.model.decoder.routers))) if pipeline is None else pipeline.rows

    def of_all_stages(self, here: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
        """What all ranks of pp hold together; where several hold the same, it is equal in every bit."""
        if self.setting.ranks.pipeline is None:
            return here
        mesh = self.setting.ranks.mesh
        parts: list[dict[Any, np.ndarray]] = [{}] * mesh.size("pp")
        dist.all_gather_object(parts, here, mesh.group("pp"))
        together: dict[Any, np.ndarray] = {}
        for name, value in (item for part in parts for item in part.items()):
            assert np.array_equal(together.setdefault(name, value), value), name
        return dict(sorted(together.items()))


def run_step(case: Case, world: int) -> dict[str, Any]:
    """All that a step leaves, the same on every rank; the gradients by name and whole, on the first only."""
    worker = Worker.of(case, world)
    ranks, step = worker.setting.ranks, worker.gradients()
    gradients = {name: whole(p.grad).numpy() for name, p in worker.model.named_parameters() if p.grad is not None}
    routing, loads = step.routing, {}
    if rows := worker.routers:
        loads = dict(zip(rows, step.loads.total().numpy(), strict=True))
    merged = worker.of_all_stages(gradients)
    return {
        "loss": float(step.report.loss),
        "norm": float(step.norm),
        "terms": {name: float(value) for name, value in step.report.terms.items()},
        "events": {name: value.numpy() for name, value in step.report.events.items()},
        "items": {name: value.numpy() for name, value in step.report.items.items()},
        "routing": {} if routing is None else {f.name: getattr(routing, f.name).numpy() for f in fields(routing)},
        "loads": worker.of_all_stages(loads),
        "router_norms": None if routing is None else step.router_norms_NE.numpy(),
        "gradients": merged if ranks.first else {},
    }


def train(case: Case, world: int, muon: bool, steps: int) -> dict[str, np.ndarray]:
    """Every weight and buffer by name, whole, after so many optimizer steps; on the first rank."""
    worker = Worker.of(case, world)
    model, moe = worker.model, worker.model.decoder.config.moe
    optimizer = build_optimizer(model, AdamWConfig(), MuonConfig() if muon else None)
    for number in range(steps):
        step = worker.gradients(seed=number)
        clip_gradients(model.parameters(), step.norm, ClipConfig(max_norm=0.5))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
        if moe is not None and moe.bias_update_rate and model.decoder.routers:
            update_expert_bias(model.decoder.routers, step.loads.total(), moe.bias_update_rate)
    weights = worker.of_all_stages({name: whole(value).numpy() for name, value in model.state_dict().items()})
    return weights if worker.setting.ranks.first else {}


def norms_of_equal_gradients(case: Case, world: int, sizes: list[float]) -> list[tuple[float, np.ndarray]]:
    """The norm and the routers' norms where every gradient that a rank has is `size`, for each of the sizes."""
    worker = Worker.of(case, world)
    norms = []
    for size in sizes:
        for parameter in worker.model.parameters():
            parameter.grad = torch.full_like(parameter, size)
        norm, rows = worker.setting.ranks.finish_gradients(worker.model)
        norms.append((float(norm), rows.numpy()))
    return norms


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()
