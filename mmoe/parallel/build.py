"""The model of a run on this rank, and the ranks that it is spread over."""

import os

import torch
import torch.distributed as dist

from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelInputs, MultimodalModel
from mmoe.models.size import parameter_count
from mmoe.parallel.materialise import materialise
from mmoe.parallel.mesh import Degrees, Mesh
from mmoe.parallel.parallelize import check_layout, parallelize, recompute_and_compile
from mmoe.parallel.pipeline import StageModel, check_stages, on_meta
from mmoe.parallel.pipeline_schedule import Pipeline
from mmoe.parallel.ranks import ManyRanks, OneProcess, Ranks
from mmoe.parallel.sequence import check_length
from mmoe.recipe.config import RunConfig
from mmoe.runtime.memory import free_memory, in_gib


def build(config: RunConfig, inputs: ModelInputs, sources: int, device: torch.device) -> tuple[MultimodalModel, Ranks]:
    """Initialise the model, whole in one process, or this rank's part of it where there is a process group."""
    _check_memory(config, inputs, device)
    if not dist.is_initialized():
        model = config.model.build(inputs, seed=config.training.seed)
        recompute_and_compile(model, config.parallel)
        return model.to(device=device, dtype=config.precision.parameter_dtype), OneProcess()
    degrees = degrees_of(config, dist.get_world_size())
    return spread(config, inputs, sources, config.training.seed, Mesh(degrees, device.type), device)


def _check_memory(config: RunConfig, inputs: ModelInputs, device: torch.device) -> None:
    """Raises ConfigError for parameters that this process's share of the free memory cannot hold."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    count = parameter_count(config.model, inputs)
    needed = count * config.precision.parameter_dtype.itemsize // world  # no layout holds less on every rank
    free = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = "memory"
    if device.type == "cuda" and not config.parallel.offload:
        free, where = torch.cuda.mem_get_info(device)[0], "GPU memory"
    if needed > free:
        raise ConfigError(
            f"the model has {count:,} parameters: {in_gib(needed)} on each of {world} processes, and {in_gib(free)} of "
            f"{where} are free for one; lower model.layers, model.d_model, model.hidden, model.moe.experts or the "
            "vocabulary, or spread it over more processes"
        )


def degrees_of(config: RunConfig, world: int) -> Degrees:
    """Of a run on `world` processes. Raises ConfigError where they, the model or the batch cannot be spread so."""
    degrees = Degrees.of(config.parallel, world)
    check_layout(config.model, degrees)
    check_length(config.data.sequence_length, degrees.cp, degrees.tp)
    config.batch_of(degrees.replicas)  # raises where the batch does not divide
    check_stages(config, degrees)
    return degrees


def spread(
    config: RunConfig, inputs: ModelInputs, sources: int, seed: int, mesh: Mesh, device: torch.device
) -> tuple[MultimodalModel, ManyRanks]:
    """This rank's part of the model with its initial weights, and the rank."""
    model = on_meta(config, inputs, mesh.degrees, mesh.rank("pp")).to(config.precision.parameter_dtype)
    parallelize(model, mesh, config.parallel, config.precision)
    shards = torch.device("cpu") if config.parallel.offload else device
    materialise(model, seed, config.model.init_std, config.model.layers, shards, device)
    pipeline = Pipeline(model, mesh, config, device) if isinstance(model, StageModel) else None
    return model, ManyRanks(mesh, config, sources, device, pipeline)
