"""Defines `PackedBatch`, the only thing the model, the losses and the statistics see of the data."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmoe.schema.modality import Modality
from mmoe.schema.quarantined import Quarantined

IGNORE = -100


@dataclass(frozen=True)
class Values:
    """Vectors of one continuous modality: `values` [N, D] f32 stand at flat positions `index` [N] i64.

    Rows are padded to the batch's budget with index -1; padded rows are zero and are never read.
    """

    values: Tensor
    index: Tensor


@dataclass(frozen=True)
class Pairs:
    """Holds contrastive pairs: `span` [P, 2, 2] i64 flat half-open [start, stop) of the two sides.

    `modality` [P, 2] u8 is the side's own modality (only its tokens are pooled), `text_hash` [P] i64 names
    the caption (equal hashes are never negatives of each other), `group` [P] i64 the contrastive group.
    """

    span: Tensor
    modality: Tensor
    text_hash: Tensor
    group: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Holds B sequences of L positions.

    Per position ([B, L]): `token_ids` i64; `modality` u8; `document` i32 (from 0 in each sequence, -1
    padding); `slice` i32 (from 0 in its document, a still image has its own, -1 none); `position` [B, L, 3]
    i32 (time, row, column); `camera` i8 (-1 none); `offset_ns` i64; `source` i16 (-1 padding); `labels` i64,
    already shifted (the id to predict from here, -100 none); `loss_weight` f32.

    `values` by continuous modality (VISION, INERTIAL, STATE, and others that have vectors); `targets`, likewise, by the
    name under which a loss term reads them, absent where the batch has none. `action_target`, `action_mask` [M, H, A]
    f32 and bool with `action_index` [M] i64, the flat position of each `action` token. `cu_seqlens` i32: borders of
    the documents over the flattened B*L, padding tails as segments of their own. `documents[b][d]` is (source, shard,
    row, part). `quarantined` are the parts that could not be decoded; their places are padding.
    `reads` is what its worker asked of remote stores since the last batch (`StorageStats`).
    """

    token_ids: Tensor
    modality: Tensor
    document: Tensor
    slice: Tensor
    position: Tensor
    camera: Tensor
    offset_ns: Tensor
    source: Tensor
    labels: Tensor
    loss_weight: Tensor
    values: dict[Modality, Values]
    action_target: Tensor
    action_mask: Tensor
    action_index: Tensor
    pairs: Pairs
    cu_seqlens: Tensor
    documents: list[list[tuple[int, int, int, int]]]
    quarantined: tuple[Quarantined, ...] = ()
    reads: dict[str, float] = field(default_factory=dict)
    targets: dict[str, Values] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.token_ids.shape[0], self.token_ids.shape[1]

    @property
    def valid(self) -> Tensor:
        """Mark the positions that are not padding, bool [B, L]."""
        return self.document >= 0

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch with every tensor on `device`."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = value.to(device, non_blocking=True)
        for name in ("values", "targets"):
            changes[name] = {
                key: Values(v.values.to(device, non_blocking=True), v.index.to(device, non_blocking=True))
                for key, v in getattr(self, name).items()
            }
        changes["pairs"] = Pairs(*(getattr(self.pairs, f.name).to(device, non_blocking=True) for f in fields(Pairs)))
        return replace(self, **changes)
