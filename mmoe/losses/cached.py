"""Computes InfoNCE of contrastive groups wider than a micro-step, in two passes (GradCache, Gao et al. 2021).

The loss that couples the micro-batches of an optimizer step reaches the weights through the embeddings alone. So a
first pass embeds every micro-batch without a graph, `cache` finds the loss of all pairs and its gradient with respect
to every embedding, and a second pass runs each micro-batch again, with a graph, in which the cached gradient stands for
all pairs that are not there. Both passes must draw the same random numbers, or their embeddings differ.

Shape suffixes as in `mmoe.losses.info_nce`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmoe.losses.info_nce import Gather, InfoNCE, info_nce
from mmoe.schema.batch import Pairs


@dataclass(frozen=True)
class Embedded:
    """Holds what the first pass keeps of a micro-batch: the two sides [P, E] of its `pairs`, detached."""

    left_PE: Tensor
    right_PE: Tensor
    pairs: Pairs


@dataclass(frozen=True)
class CachedInfoNCE:
    """Holds what the second pass needs of a micro-batch.

    `nce` holds its pairs' own items, detached; the gradients are those of the sum of the items of all pairs, also
    of other micro-batches and ranks, with respect to its embeddings.
    """

    nce: InfoNCE
    left_gradient_PE: Tensor
    right_gradient_PE: Tensor

    def __call__(self, left_PE: Tensor, right_PE: Tensor) -> InfoNCE:
        """Return the `nce` with gradient: that of the sum of `items_P` is the cached one."""
        linear_P = (left_PE * self.left_gradient_PE + right_PE * self.right_gradient_PE).sum(1)
        return replace(self.nce, items_P=self.nce.items_P + (linear_P - linear_P.detach()))


def cache(micro_batches: Sequence[Embedded], tau: float, gather: Gather | None = None) -> list[CachedInfoNCE]:
    """Compute InfoNCE over the pairs of all micro-batches of this rank's step, and of all ranks through `gather`."""
    sizes = [len(embedded.pairs.group) for embedded in micro_batches]
    left = torch.cat([embedded.left_PE for embedded in micro_batches]).detach().requires_grad_()
    right = torch.cat([embedded.right_PE for embedded in micro_batches]).detach().requires_grad_()
    # The spans are positions of different micro-batches now; InfoNCE reads none.
    pairs = Pairs(*(torch.cat([getattr(one.pairs, field.name) for one in micro_batches]) for field in fields(Pairs)))
    with torch.enable_grad():
        nce = info_nce(left, right, pairs, tau, gather)
        gradients = torch.autograd.grad(nce.items_P.sum(), (left, right))
    results = (nce.items_P.detach(), nce.correct_P2, nce.negatives_P, nce.masked_P)
    shares = zip(*(tensor.split(sizes) for tensor in (*results, *gradients)), strict=True)
    return [CachedInfoNCE(InfoNCE(*share[:4]), *share[4:]) for share in shares]
