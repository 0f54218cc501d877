"""The attention rule: which position may see which. Every backend is tested against this one function."""

import torch
from torch import Tensor

from mmoe.data.sample import Modality


def may_attend(document: Tensor, slice: Tensor, modality: Tensor, bidirectional: bool) -> Tensor:
    """[..., L] of `PackedBatch` -> [..., L, L] bool: whether position i (row) may see position j (column).

    It may when both are in the same document and either j <= i or (`bidirectional`) both are VISION of the same
    slice. Padding sees nothing and is seen by nothing.
    """
    order = torch.arange(document.shape[-1], device=document.device)
    allowed = order[:, None] >= order
    if bidirectional:
        picture = torch.where((modality == Modality.VISION) & (slice >= 0), slice, -1)
        allowed = allowed | (_equal(picture) & (picture >= 0)[..., None])
    return _equal(document) & (document >= 0)[..., None] & allowed


def _equal(x: Tensor) -> Tensor:
    return x[..., :, None] == x[..., None, :]
