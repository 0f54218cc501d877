"""Says of sequences that lie on several ranks which positions are where, and what the model needs to know of them.

The ranks of cp share the positions that attention works on, those of tp split each share once more in between (sequence
parallelism). Shape suffixes as in `mmoe.models`: B sequences, L positions, D model width; M = L / cp positions in
attention, H = M / tp positions here; T tokens; n ranks.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mmoe.errors import ConfigError
from mmoe.models.attention.backend import BatchAttention
from mmoe.models.batch_context import BatchContext
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.tokens import Tokens
from mmoe.models.rotary import RotaryTables
from mmoe.parallel.collectives import all_gather_replicated, all_gather_scatter_grad
from mmoe.parallel.context import ContextAttention
from mmoe.parallel.mesh import Mesh
from mmoe.schema.batch import PackedBatch, Values

PIECES = 4  # of a sequence, that each rank of cp gets


@dataclass(frozen=True)
class Positions:
    """Says which positions (of L, a row for each of B sequences) are on which rank.

    In attention they are on the ranks of cp, and in the residual stream on those of cp x tp, of which this is `rank`.
    """

    attended_cBM: Tensor
    streamed_nBH: Tensor
    rank: int

    @classmethod
    def for_rank(cls, document_BL: Tensor, cp: int, tp: int, rank: int) -> "Positions":
        """Deal the positions of a batch to the ranks.

        Raises ConfigError where the ranks cannot share a sequence evenly.
        """
        sequences, length = document_BL.shape
        check_length(length, cp, tp)
        owned = _deal(document_BL, cp) if cp > 1 else torch.arange(length).expand(1, sequences, length)
        owned = owned.to(document_BL.device)
        return cls(owned, owned.unflatten(2, (tp, -1)).permute(0, 2, 1, 3).flatten(0, 1), rank)

    @property
    def here_BH(self) -> Tensor:
        """The positions of this rank."""
        return self.streamed_nBH[self.rank]

    def local(self, batch: PackedBatch) -> PackedBatch:
        """Return the positions here, as a batch of [B, H] for the embeddings.

        Vectors that belong elsewhere have index -1.
        """
        length = batch.shape[1]
        flat = _flat(self.here_BH, length)
        place = torch.full((batch.token_ids.numel(),), -1, device=flat.device)
        place[flat] = torch.arange(len(flat), device=flat.device)
        whole = [f.name for f in fields(PackedBatch) if f.name in _POSITIONED]
        values = {
            kind: Values(v.values, torch.where(v.index >= 0, place[v.index.clamp(min=0)], -1))
            for kind, v in batch.values.items()
        }
        taken = {name: getattr(batch, name).flatten(0, 1)[flat].unflatten(0, self.here_BH.shape) for name in whole}
        return replace(batch, **taken, values=values)

    def arrange(self, parts_nBHX: Tensor) -> Tensor:
        """Put the parts of all ranks in the order of the sequences, [n, B, H, X] -> [B, L, X]."""
        order = _by_sequence(self.streamed_nBH).argsort(1)
        flat = _flat(order, order.shape[1])
        return _by_sequence(parts_nBHX).flatten(0, 1).index_select(0, flat).unflatten(0, order.shape)


@dataclass(frozen=True)
class Sharding(Positions):
    """Says which positions of a batch are on which rank of `mesh`."""

    mesh: Mesh

    @classmethod
    def from_batch(cls, batch: PackedBatch, mesh: Mesh) -> "Sharding":
        """Deal the positions of the batch to the ranks.

        Raises ConfigError where the ranks cannot share a sequence evenly.
        """
        dims = mesh.dims
        found = Positions.for_rank(batch.document, dims.cp, dims.tp, mesh.rank("sequence"))
        return cls(found.attended_cBM, found.streamed_nBH, found.rank, mesh)

    def context(self, batch: PackedBatch, config: ModelConfig, dtype: torch.dtype) -> BatchContext:
        """Make the context of the blocks on this rank, of the whole `batch`."""
        cp, bidirectional = self.mesh.rank("cp"), config.bidirectional_slices
        attended_BM = self.attended_cBM[cp]
        position = batch.position.flatten(0, 1)[_flat(attended_BM, batch.shape[1])].unflatten(0, attended_BM.shape)
        attention: BatchAttention
        if self.mesh.dims.cp > 1:
            group, backend = self.mesh.group("cp"), config.attention_class
            attention = ContextAttention.from_batch(batch, bidirectional, backend, self.attended_cBM, cp, group)
        else:
            attention = config.attention_class.from_batch(batch, bidirectional)
        return BatchContext(
            RotaryTables.from_positions(position, config.head_width, config.rope_theta, dtype),
            attention,
            SplitTokens.split(Tokens.from_batch(batch), self),
        )

    def whole(self, hidden_BHD: Tensor) -> Tensor:
        """Gather the hidden states [B, L, D] of the positions of all ranks.

        Every rank's use of them adds to the gradient.
        """
        return self.arrange(all_gather_scatter_grad(hidden_BHD, self.mesh.group("sequence")))


def check_length(length: int, cp: int, tp: int) -> None:
    """Raise ConfigError where cp x tp ranks cannot share sequences of `length` positions."""
    unit = (cp * PIECES if cp > 1 else 1) * tp
    if length % unit:
        pieces = f"{PIECES} pieces for each of cp {cp}, and " if cp > 1 else ""
        raise ConfigError(
            f"data.sequence_length is {length}, but {pieces}tp {tp} ranks share every sequence; make it a multiple of "
            f"{unit}, or change parallel.cp or parallel.tp"
        )


@dataclass(frozen=True)
class SplitTokens(Tokens):
    """Holds the tokens of sequences that lie on several ranks.

    The fields are of all T tokens, the rows are of those that are here.
    """

    sharding: Sharding
    valid_H: Tensor  # [B H] numbers of the flattened positions here that are not padding
    numbers_T: Tensor

    @classmethod
    def split(cls, tokens: Tokens, sharding: Sharding) -> "SplitTokens":
        """Note which of the tokens are on this rank."""
        number = tokens.number_N[_flat(sharding.here_BH, tokens.length)]
        valid = (number < len(tokens.position_T)).nonzero().squeeze(1)
        shared = {f.name: getattr(tokens, f.name) for f in fields(Tokens)}
        return cls(**shared, sharding=sharding, valid_H=valid, numbers_T=number[valid])

    @property
    def local_index_T(self) -> Tensor:
        """The numbers (of T) of the tokens here."""
        return self.numbers_T

    def gather_valid(self, x_BHD: Tensor) -> Tensor:
        """Give the rows [H, D] of the tokens among the positions here."""
        return x_BHD.flatten(0, 1).index_select(0, self.valid_H)

    def scatter_valid(self, y_TD: Tensor) -> Tensor:
        """Put each token here at its position, zeros at padding."""
        shape = self.sharding.here_BH.shape
        return y_TD.new_zeros(shape.numel(), y_TD.shape[1]).index_copy(0, self.valid_H, y_TD).unflatten(0, shape)

    def all_gather_tokens(self, x_TX: Tensor) -> Tensor:
        """Gather the rows [T, X] of all tokens of the sequences."""
        parts = all_gather_replicated(self.scatter_valid(x_TX), self.sharding.mesh.group("sequence"))
        return self.sharding.arrange(parts).flatten(0, 1)[self.position_T]


_POSITIONED = {
    "token_ids", "modality", "document", "slice", "position", "camera", "offset_ns", "source", "labels", "loss_weight"
}  # fmt: skip


def _flat(position_BX: Tensor, length: int) -> Tensor:
    """Number the positions in the flattened B L."""
    return (position_BX + length * torch.arange(len(position_BX), device=position_BX.device)[:, None]).flatten()


def _by_sequence(x_nBHX: Tensor) -> Tensor:
    """Bring the ranks' parts of each sequence together, [n, B, H, ...] -> [B, n H, ...]."""
    return x_nBHX.transpose(0, 1).flatten(1, 2)


def _deal(document_BL: Tensor, cp: int) -> Tensor:
    """Deal positions to the ranks that attend from them, [cp, B, L / cp], equal in number and about equal in work.

    A sequence is cut into pieces, whose work is the number of keys that their positions see; the costliest go first,
    in snake order. For a sequence of one document this is the customary zig-zag.
    """
    sequences, length = document_BL.shape
    size = length // (cp * PIECES)
    out = torch.empty(cp, sequences, length // cp, dtype=torch.long)
    for number, document in enumerate(document_BL.cpu().numpy()):
        order = np.arange(length)
        start = np.where(np.diff(document, prepend=document[0] - 1) != 0, order, 0)
        work = np.where(document >= 0, order - np.maximum.accumulate(start) + 1, 0).reshape(-1, size).sum(1)
        rounds = np.argsort(-work, kind="stable").reshape(PIECES, cp)
        rounds[1::2] = rounds[1::2, ::-1].copy()
        pieces = np.sort(rounds, axis=0).T
        out[:, number] = torch.from_numpy((pieces[:, :, None] * size + np.arange(size)).reshape(cp, -1))
    return out
