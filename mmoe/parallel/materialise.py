"""Initial values of a model that was built without memory: each rank makes its own shards."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmoe.models.init import initial_value


@torch.no_grad()
def materialise(model: nn.Module, seed: int, std: float, layers: int, device: torch.device) -> None:
    """Give the meta tensors of `model` memory on `device` and the values of `mmoe.models.init`, buffers zeros."""
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, seed, std, layers).to(device, parameter.dtype)
        if isinstance(parameter, DTensor):
            # Every rank makes the whole value and keeps its part: nothing is sent.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
