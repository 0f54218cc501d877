"""Computes the bytes of weights, gradients and optimizer states that a rank keeps, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from mmoe.optim.config import OptimConfig
from mmoe.optim.optimizer import owner
from mmoe.parallel.setting import RankSetting
from mmoe.planning.memory_shards import RankPlace, shards


@dataclass(frozen=True)
class StateMemory:
    """Holds the bytes that a rank keeps between two steps; what is gathered or computed within one comes on top.

    With ZeRO-1 and several micro-batches, gradients are whole until the last one: `whole_gradients`, else 0.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    whole_gradients: int

    @classmethod
    def from_setting(cls, setting: RankSetting, optim: OptimConfig, model: nn.Module, place: RankPlace) -> StateMemory:
        """Compute the memory of a rank at `place` whose part of the model is `model` (on meta)."""
        found = shards(setting.model, setting.precision, model, setting.dims, place)
        dtype = setting.precision.parameter_dtype
        width = dtype.itemsize
        held = sum(shard.held(place) for shard in found)
        states = 0
        for parameter, shard in zip(model.parameters(), found, strict=True):
            optimizer = owner(shard.name, parameter.ndim, optim.optimizer, optim.matrices)
            for tensor in optimizer.state_layout(tuple(parameter.shape)).values():
                size = shard.held(place) if tensor.shape is None else prod(tensor.shape)
                states += size * (tensor.dtype or dtype).itemsize
        late = setting.parallel.zero == 1 and setting.batch.accumulation > 1
        whole = sum(shard.gathered for shard in found) if late else 0
        return cls(held, held * width, held * width, states, whole * width)
