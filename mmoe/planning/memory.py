"""Bytes of weights, gradients and optimizer states that a rank keeps, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmoe.parallel.mesh import Degrees
from mmoe.planning.memory_shards import Place, shards
from mmoe.recipe.config import RunConfig

STEP = 4  # bytes


@dataclass(frozen=True)
class StateMemory:
    """Between two steps; what is gathered or computed within one comes on top. With ZeRO-1 and several micro-batches,
    gradients are whole until the last one: `whole_gradients`, else 0."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    whole_gradients: int

    @classmethod
    def of(cls, config: RunConfig, degrees: Degrees, model: nn.Module, place: Place) -> StateMemory:
        """Of a rank at `place` whose part of the model is `model` (on meta)."""
        found = shards(config, model, degrees, place)
        width = config.precision.parameter_dtype.itemsize
        held = sum(shard.held(place) for shard in found)
        states = 0
        for shard in found:
            matrix = ".blocks." in shard.name and len(shard.shape) == 2 and ".router." not in shard.name
            if matrix and config.optim.muon is not None:
                states += shard.held(place) * width  # Muon: momentum
            else:
                states += 2 * shard.held(place) * width + STEP  # AdamW: two moments, and the number of steps
        steps = config.batch_of(degrees.replicas).accumulation
        whole = sum(shard.gathered for shard in found) if config.parallel.zero == 1 and steps > 1 else 0
        return cls(held, held * width, held * width, states, whole * width)
