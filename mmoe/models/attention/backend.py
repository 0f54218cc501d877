"""Defines the interface of an attention backend, and the registry of backends.

What a backend needs of a batch (document borders, masks) is worked out once a forward pass, in `from_batch`, and
shared by all layers. Shape suffixes: B sequences, L positions, H heads, G key/value heads, K head width; b documents
of n queries and m keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from mmoe.config.registry import ClassRegistry
from mmoe.schema.batch import PackedBatch

Rule = Literal["causal", "bidirectional_slices"]  # the second adds to the first what a key of the model's config says


class BatchAttention(Protocol):
    """Attends under the attention rule of one batch, which all layers share."""

    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Attend from queries to keys and values of the batch, [B, L, H, K] in the dtype of v; zeros at padding."""


class AttentionBackend(ABC):
    """Attends over a batch whose positions are all on this process, and says what it can do.

    A class registered in `ATTENTION_BACKENDS` is a value of ``model.attention``. What it says of itself:

    - `requires`: names of `mmoe.optional` (packages, ``cuda``), without which a run is refused at its start.
    - `rules`: the attention rules that it keeps; a config that asks for another one is refused.
    - `supports_cp`: `attend_masked` works, so that the ranks of context parallelism can share a sequence.
    - `saved_ops`: the operations whose results selective recomputation keeps, beside plain matrix products.
    - `backward_flops`: operations of the backward pass over those of the forward pass. The default is that of a kernel
      that computes the scores again: five products over two (Dao et al. 2022).
    """

    requires: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[frozenset[Rule]] = frozenset({"causal"})
    supports_cp: ClassVar[bool] = False
    saved_ops: ClassVar[frozenset[Any]] = frozenset()
    backward_flops: ClassVar[float] = 5 / 2

    @classmethod
    @abstractmethod
    def from_batch(cls, batch: PackedBatch, bidirectional: bool) -> BatchAttention:
        """Work out what every layer will need of this batch; `bidirectional` adds the rule of slices."""

    @abstractmethod
    def attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        """Attend from queries to keys and values of the batch, [B, L, H, K] in the dtype of v; zeros at padding.

        Gradients of q, k and v must be there even where all is padding (`differentiable`).
        """

    @classmethod
    @abstractmethod
    def flops(cls, documents: Sequence[int], heads: int, head_dim: int) -> int:
        """Count the operations of a layer's forward pass over one sequence; a multiplication with an addition is two.

        `documents`: the lengths, in positions, of the documents that fill the sequence.
        """

    @classmethod
    def attend_masked(cls, q_bHnK: Tensor, k_bGmK: Tensor, v_bGmK: Tensor, mask_nm: Tensor) -> Tensor:
        """Attend from some queries of a document to all its keys, [b, H, n, K]; only with `supports_cp`.

        `mask_nm`: True where a query may see a key.
        """
        raise NotImplementedError


ATTENTION_BACKENDS = ClassRegistry[AttentionBackend](
    "attention backend",
    "mmoe.attention",
    AttentionBackend,
    {
        "sdpa_documents": "mmoe.models.attention.documents:DocumentAttention",
        "dense": "mmoe.models.attention.dense:DenseAttention",
    },
)


def differentiable(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `out`, with zeros as gradients of q, k and v where it was made of padding alone and would have none.

    Ranks that add up their gradients must all have the same ones.
    """
    if out.requires_grad or not q.requires_grad:
        return out
    return out + 0 * (q.sum() + k.sum() + v.sum())
