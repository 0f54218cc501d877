"""Defines what reads the backbone's hidden states beside the vocabulary: action chunks and contrastive pairs.

Shape suffixes: B sequences, L positions, D model width (`size`), M action chunks, P contrastive pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.precision.upcast import upcast
from mmoe.schema.batch import Pairs
from mmoe.schema.modality import CONTRASTED, Modality


class ActionHead(nn.Module):
    """Predicts continuous actions from hidden states, [M, size] -> [M, chunk, dim], in float32 or wider."""

    def __init__(self, size: int, chunk: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, chunk * dim)
        self.shape = (chunk, dim)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Predict the actions [M, chunk, dim] from hidden states [M, size]."""
        with torch.autocast(hidden_MD.device.type, enabled=False):
            hidden = self.hidden(hidden_MD.to(self.hidden.weight.dtype))
            return upcast(self.output(F.silu(hidden))).unflatten(1, self.shape)


class ContrastHead(nn.Module):
    """Pools the spans of pairs and projects them to a common space of `width`, a projection per modality."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({kind.name.lower(): nn.Linear(size, width, bias=False) for kind in CONTRASTED})

    def forward(self, hidden_BLD: Tensor, pairs: Pairs, modality_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Embed either side of each pair, [P, width] of length 1, in float32 or wider.

        A span without tokens of its own gives zeros.
        """
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            pooled, kind = self._pool(hidden_BLD, pairs, modality_BL), pairs.modality.flatten()
            parts = (
                F.linear(torch.where((kind == modality)[:, None], pooled, 0), upcast(self._weight(modality)))
                for modality in CONTRASTED
            )
            projected = sum(parts, start=pooled.new_zeros(()))
            return F.normalize(projected, dim=1).unflatten(0, pairs.modality.shape).unbind(1)

    def _weight(self, modality: Modality) -> Tensor:
        return self.get_parameter(f"projections.{modality.name.lower()}.weight")

    @staticmethod
    def _pool(hidden_BLD: Tensor, pairs: Pairs, modality_BL: Tensor) -> Tensor:
        """Average each span over the tokens of its own modality, [2 P, D]."""
        start, stop = pairs.span.flatten(0, 1).unbind(1)
        size = stop - start
        side = torch.repeat_interleave(size)
        position = torch.arange(len(side), device=side.device) - (size.cumsum(0) - size)[side] + start[side]
        own = modality_BL.flatten()[position] == pairs.modality.flatten()[side]
        side, position = side[own], position[own]
        hidden = upcast(hidden_BLD.flatten(0, 1)[position])
        sums = hidden.new_zeros(len(size), hidden.shape[1]).index_add(0, side, hidden)
        return sums / side.bincount(minlength=len(size)).clamp(min=1)[:, None]
