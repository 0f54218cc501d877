"""Defines the attention rule: which position may see which. Every backend is tested against this one function.

Shape suffix: L positions.
"""

import torch
from torch import Tensor

from mmoe.schema.modality import Modality


def may_attend(
    document: Tensor, slice: Tensor, modality: Tensor, bidirectional: bool, queries: range | None = None
) -> Tensor:
    """Return whether position i (row) may see position j (column), bool [..., L, L].

    `document`, `slice` and `modality`: those of `PackedBatch`, [..., L]. With `queries` only these rows,
    [..., queries, L].

    It may when both are in the same document and either j <= i or (`bidirectional`) both are VISION of the same
    slice. Padding sees nothing and is seen by nothing.
    """
    rows = torch.arange(document.shape[-1], device=document.device)
    order = rows
    if queries is not None:
        rows = rows[queries.start : queries.stop]
    allowed = rows[:, None] >= order
    if bidirectional:
        image = torch.where((modality == Modality.VISION) & (slice >= 0), slice, -1)
        allowed = allowed | (_equal(image, rows) & (image >= 0)[..., rows, None])
    return _equal(document, rows) & (document >= 0)[..., rows, None] & allowed


def _equal(x: Tensor, rows: Tensor) -> Tensor:
    return x[..., rows, None] == x[..., None, :]
