"""Draws gating noise as a pure function of the step's seed, the layer, the token and the expert.

No generator is drawn from, so the noise of a token is the same in every layout, however a step is cut into
micro-batches, and whenever its forward pass is run again. A token is known by its place in its sequence and the ids of
that sequence. Shape suffixes: B sequences, L positions, T tokens, E experts.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mmoe.hashing import SIGNED_INCREMENT, mix64, shifted_right

BITS = 24  # of a uniform number, which float32 holds exactly


def token_keys(id_BL: Tensor) -> Tensor:
    """Compute a key for every position, i64 [B, L] -> i64 [B, L]; other sequences and places have other keys."""
    place_L = SIGNED_INCREMENT * torch.arange(1, id_BL.shape[1] + 1, device=id_BL.device)
    sequence_B1 = mix64(id_BL + place_L).sum(1, keepdim=True)
    return mix64(sequence_B1 + place_L)


def gaussian(key_T: Tensor, experts: int, seed: int, layer: int) -> Tensor:
    """Draw float32 noise [T, E] of mean 0 and variance 1, each number independent of the others.

    It is independent of that of other seeds and layers, too.
    """
    stream = np.random.SeedSequence((seed, layer)).generate_state(1, np.uint64).view(np.int64)[0]
    expert_E = SIGNED_INCREMENT * torch.arange(1, experts + 1, device=key_T.device)
    word_TE = mix64(mix64(key_T ^ int(stream))[:, None] + expert_E)
    odd_TE = 2 * shifted_right(word_TE, 64 - BITS) + 1 - (1 << BITS)  # odd, and smaller than 2^24 on either side of 0
    return math.sqrt(2) * torch.erfinv(odd_TE.float() / (1 << BITS))
