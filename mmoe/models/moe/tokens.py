"""Defines what the layers of experts need to know of a batch's tokens beside their hidden states.

Shape suffixes: B sequences, L positions, N = B L flattened positions, T tokens, D model width, X numbers of any kind.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmoe.models.moe.noise import token_keys
from mmoe.models.moe.rows import permute_tokens
from mmoe.schema.batch import PackedBatch


@dataclass(frozen=True)
class Tokens:
    """Lists the T valid positions of a batch, found once a forward pass. Padding is not among them.

    `position_T` is ascending over the N = B L flattened positions, `number_N` the number of the token at each, T
    at padding. `id_BL` are the batch's token ids, `sources` the number of sources that a table by source has to have.
    """

    position_T: Tensor
    number_N: Tensor
    sequence_T: Tensor
    modality_T: Tensor
    source_T: Tensor
    id_BL: Tensor
    sources: int

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> "Tokens":
        """Find the valid positions of a batch."""
        valid = batch.valid.flatten()
        position = valid.nonzero().squeeze(1)
        return cls(
            position_T=position,
            number_N=torch.where(valid, valid.cumsum(0) - 1, len(position)),
            sequence_T=position // batch.shape[1],
            modality_T=batch.modality.flatten()[position].long(),
            source_T=batch.source.flatten()[position].long(),
            id_BL=batch.token_ids,
            sources=1 + max((origin[0] for documents in batch.documents for origin in documents), default=0),
        )

    @property
    def sequences(self) -> int:
        """The number of sequences, B."""
        return self.id_BL.shape[0]

    @property
    def length(self) -> int:
        """The number of positions of a sequence, L."""
        return self.id_BL.shape[1]

    @cached_property
    def key_T(self) -> Tensor:
        """The key of each token, i64: the same in every batch that its sequence may be part of.

        Worked out once for all layers.
        """
        return token_keys(self.id_BL).flatten()[self.position_T]

    def gather_valid(self, x_BLD: Tensor) -> Tensor:
        """Gather the rows of the tokens, [B, L, D] -> [T, D]."""
        x_ND = x_BLD.flatten(0, 1)
        return x_ND if self._unpadded else permute_tokens(x_ND, self.position_T, self.number_N)

    def scatter_valid(self, y_TD: Tensor) -> Tensor:
        """Scatter each token to its position, [T, D] -> [B, L, D], with zeros at padding."""
        y_ND = y_TD if self._unpadded else permute_tokens(y_TD, self.number_N, self.position_T)
        return y_ND.unflatten(0, (self.sequences, self.length))

    @property
    def local_index_T(self) -> Tensor | None:
        """The numbers (of T) of the tokens whose hidden states are here; None for all of them."""
        return None

    def all_gather_tokens(self, x_TX: Tensor) -> Tensor:
        """Gather the rows of all tokens of the sequences, [T, X], from those that are here."""
        return x_TX

    @property
    def _unpadded(self) -> bool:
        return len(self.position_T) == len(self.number_N)
