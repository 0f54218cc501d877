"""Gives a model that was built without memory its initial values: each rank makes its own shards."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmoe.compat import local_shape_and_offset
from mmoe.models.init import initial_value, is_of_experts


@torch.no_grad()
def materialize(
    model: nn.Module, seed: int, std: float, layers: int, device: torch.device, compute: torch.device
) -> None:
    """Give the meta tensors of `model` memory and their initial values.

    Parameters are on `device`, with the values of `mmoe.models.init`, and buffers, zeros, on `compute`.
    """
    model.to_empty(device=device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=compute))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and is_of_experts(name):
            parameter.to_local().copy_(_own_experts(name, parameter, seed, std, layers))
        else:
            assign(parameter, initial_value(name, parameter.shape, seed, std, layers))


@torch.no_grad()
def assign(parameter: Tensor, whole: Tensor) -> None:
    """Give a tensor, or this rank's part of it, its values. Every rank has the whole: nothing is sent."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    value = whole.to(parameter.device, parameter.dtype)
    parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))


def _own_experts(name: str, parameter: DTensor, seed: int, std: float, layers: int) -> Tensor:
    """Draw the experts here alone: there may be many more."""
    shape, offset = local_shape_and_offset(parameter)
    experts = range(offset[0], offset[0] + shape[0])
    value = initial_value(name, parameter.shape, seed, std, layers, experts)
    return value[:, offset[1] : offset[1] + shape[1], offset[2] : offset[2] + shape[2]]
