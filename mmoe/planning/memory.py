"""Bytes of weights, gradients and optimizer states that a rank keeps, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmoe.optim.muon import is_block_matrix
from mmoe.parallel.setting import RankSetting
from mmoe.planning.memory_shards import Place, shards

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
    def of(cls, setting: RankSetting, muon: bool, model: nn.Module, place: Place) -> StateMemory:
        """Of a rank at `place` whose part of the model is `model` (on meta); `muon` updates the matrices of blocks."""
        found = shards(setting.model, setting.precision, model, setting.degrees, place)
        width = setting.precision.parameter_dtype.itemsize
        held = sum(shard.held(place) for shard in found)
        states = 0
        for shard in found:
            if muon and is_block_matrix(shard.name, len(shard.shape)):
                states += shard.held(place) * width  # Muon: momentum
            else:
                states += 2 * shard.held(place) * width + STEP  # AdamW: two moments, and the number of steps
        late = setting.parallel.zero == 1 and setting.batch.accumulation > 1
        whole = sum(shard.gathered for shard in found) if late else 0
        return cls(held, held * width, held * width, states, whole * width)
