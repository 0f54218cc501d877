"""The losses that keep a router healthy, per sequence, so that every layout agrees on them."""

import torch
from torch import Tensor

from mmoe.models.moe.router import Routing
from mmoe.models.moe.tokens import Tokens


def balance_loss(routing: Routing, tokens: Tokens) -> Tensor:
    """E * sum_e f_e P_e of each sequence, meaned over the B sequences: a scalar, 1 at perfect balance.

    f_e is the share of the sequence's choices that fell on expert e (before any drop, no gradient), P_e the mean
    score of e over its valid tokens (Switch Transformer, Fedus et al. 2021; f divided by K). A sequence without
    a valid token counts zero.
    """
    experts, top_k = routing.logits_TE.shape[1], routing.expert_TK.shape[1]
    group = tokens.sequence_T[:, None] * experts + routing.expert_TK
    load = group.flatten().bincount(minlength=tokens.sequences * experts).view(-1, experts)
    share = load.to(routing.scores_TE.dtype) / (_counts(tokens)[:, None] * top_k)
    return experts * (share * _sequence_means(routing.scores_TE, tokens)).sum(1).mean()


def z_loss(routing: Routing, tokens: Tokens) -> Tensor:
    """logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022), meaned over a sequence's valid tokens, then over sequences."""
    return _sequence_means(routing.logits_TE.logsumexp(1, keepdim=True).square(), tokens).mean()


def _sequence_means(values_TX: Tensor, tokens: Tokens) -> Tensor:
    """[B, X]: means over each sequence's valid tokens."""
    sums = values_TX.new_zeros(tokens.sequences, values_TX.shape[1])
    return sums.index_add(0, tokens.sequence_T, values_TX) / _counts(tokens)[:, None]


def _counts(tokens: Tokens) -> Tensor:
    """[B]: valid tokens of each sequence, at least 1."""
    return torch.bincount(tokens.sequence_T, minlength=tokens.sequences).clamp(min=1)
