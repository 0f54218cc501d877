"""The model of a run on this rank, and the ranks that it is spread over."""

import torch
import torch.distributed as dist

from mmoe.config.tree import RunConfig
from mmoe.models.decoder import ModelInputs, MultimodalModel
from mmoe.parallel.materialise import materialise
from mmoe.parallel.mesh import Degrees, Mesh
from mmoe.parallel.parallelize import check_layout, parallelize
from mmoe.parallel.ranks import ManyRanks, OneProcess, Ranks
from mmoe.parallel.sequence import check_length


def build(config: RunConfig, inputs: ModelInputs, sources: int, device: torch.device) -> tuple[MultimodalModel, Ranks]:
    """Initialise the model, whole in one process, or this rank's part of it where there is a process group."""
    if not dist.is_initialized():
        model = config.model.build(inputs, seed=config.training.seed)
        return model.to(device=device, dtype=config.precision.parameter_dtype), OneProcess()
    degrees = Degrees.of(config.parallel, dist.get_world_size())
    check_layout(config.model, degrees)
    check_length(config.data.sequence_length, degrees.cp, degrees.tp)
    config.batch_of(degrees.replicas)  # raises where the batch does not divide
    mesh = Mesh(degrees, device.type)
    with torch.device("meta"):
        model = MultimodalModel(config.model, inputs)
    model.to(config.precision.parameter_dtype)
    parallelize(model, mesh, config.parallel, config.precision)
    materialise(model, config.training.seed, config.model.init_std, config.model.layers, device)
    return model, ManyRanks(mesh, config, sources, device)
