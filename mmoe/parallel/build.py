"""Builds the model of a run on this rank, and the ranks that it is spread over."""

import os

import torch
import torch.distributed as dist

from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelInputs, MultimodalModel
from mmoe.models.size import parameter_count
from mmoe.parallel.materialize import materialize
from mmoe.parallel.mesh import Mesh
from mmoe.parallel.parallelize import parallelize, recompute_and_compile
from mmoe.parallel.pipeline import StageModel, on_meta
from mmoe.parallel.pipeline_schedule import Pipeline
from mmoe.parallel.ranks import LocalExecutor, MeshExecutor, StepExecutor
from mmoe.parallel.setting import RankSetting
from mmoe.runtime.memory import free_memory, in_gib


def build(
    setting: RankSetting, inputs: ModelInputs, sources: int, seed: int, device: torch.device
) -> tuple[MultimodalModel, StepExecutor]:
    """Build the model and its executor: whole in one process, this rank's part of it where there is a process group."""
    _check_memory(setting, inputs, device)
    if not dist.is_initialized():
        model = setting.model.build(inputs, seed, setting.heads(inputs))
        recompute_and_compile(model, setting.parallel)
        return model.to(device=device, dtype=setting.precision.parameter_dtype), LocalExecutor()
    return build_spread(setting, inputs, sources, seed, Mesh(setting.dims, device.type), device)


def _check_memory(setting: RankSetting, inputs: ModelInputs, device: torch.device) -> None:
    """Raise ConfigError for parameters that this process's share of the free memory cannot hold."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    count = parameter_count(setting.model, inputs)
    needed = count * setting.precision.parameter_dtype.itemsize // world  # no layout holds less on every rank
    free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = "memory"
    if device.type == "cuda" and not setting.parallel.offload:
        free, where = torch.cuda.mem_get_info(device)[0], "GPU memory"
    if needed > free:
        raise ConfigError(
            f"the model has {count:,} parameters: {in_gib(needed)} on each of {world} processes, and {in_gib(free)} of "
            f"{where} are free for one; lower model.n_layers, model.d_model, model.intermediate_size, "
            "model.moe.n_experts or the vocabulary, or spread it over more processes"
        )


def build_spread(
    setting: RankSetting, inputs: ModelInputs, sources: int, seed: int, mesh: Mesh, device: torch.device
) -> tuple[MultimodalModel, MeshExecutor]:
    """Build this rank's part of the model with its initial weights, and the executor of this rank."""
    model = on_meta(setting, inputs, mesh.rank("pp"))
    parallelize(model, mesh, setting.parallel, setting.precision)
    shards = torch.device("cpu") if setting.parallel.offload else device
    materialize(model, seed, setting.model.init_std, setting.model.n_layers, shards, device)
    pipeline = Pipeline(model, mesh, setting, device) if isinstance(model, StageModel) else None
    return model, MeshExecutor(mesh, setting, sources, device, pipeline)
