"""Counts parameters by what they do, and the floating-point operations of a training step, in closed form.

A multiplication with an addition is two operations. `model_flops` is what the model asks for (what MFU divides):
forward 2 N a token plus attention by document lengths, training three times that. `computed_flops` is what one rank
computes: empty rows of a capacity, layers computed again, what its attention backend says, and the logits, which the
backward pass always computes again. Embeddings of vectors and time, the heads beside the vocabulary, and the
router losses are left out: under 1 % of a large model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.models.embeddings import ModelInputs


@dataclass(frozen=True)
class ParameterCounts:
    """Holds the numbers of a model's parameters by what they do.

    `total` of tables and blocks, the `active` ones of a token (with its whole input table), and those that a token
    is `multiplied` with; `experts` of all layers, `others` are beside tables and blocks.
    """

    total: int
    active: int
    multiplied: int
    experts: int
    others: int

    @classmethod
    def from_config(
        cls, config: ModelConfig, inputs: ModelInputs, heads: Mapping[str, nn.Module] | None = None
    ) -> ParameterCounts:
        """Count the parameters of a model of `config` with `heads`, which is built without memory."""
        with torch.device("meta"):
            model = MultimodalModel(config, inputs, heads)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        table = sizes["embeddings.token.weight"]
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        norms = sum(size for name, size in sizes.items() if name.startswith("decoder.") and "norm" in name)
        decoder = sum(size for name, size in sizes.items() if name.startswith("decoder."))
        tables = table + sizes.get("unembedding.weight", 0)
        total = decoder + tables
        chosen = 0 if config.moe is None else experts * config.moe.top_k // config.moe.n_experts
        active = total - experts + chosen
        looked_up = 0 if config.tie_embeddings else table
        return cls(total, active, active - norms - looked_up, experts, sum(sizes.values()) - total)


def attention_forward(config: ModelConfig, documents: Iterable[int]) -> int:
    """Count the operations of the attention of all layers, forward, over causal documents of so many positions each."""
    return _attention(config, sum(length**2 for length in documents))


def model_flops(config: ModelConfig, inputs: ModelInputs, documents: list[int]) -> int:
    """Count the operations, forward and backward, that the model asks for over documents of so many positions.

    6 N a token and attention (Chowdhery et al. 2022, appendix B, with causal documents in place of a full window).
    """
    multiplied = ParameterCounts.from_config(config, inputs).multiplied
    return training_flops(config, multiplied, sum(documents), sum(length**2 for length in documents))


def training_flops(config: ModelConfig, multiplied: int, positions: int, squares: int) -> int:
    """Count what `model_flops` counts from sums over a step, without the lengths of its documents.

    `multiplied`: the parameters that a position is multiplied with (`ParameterCounts`). `positions`: those of the
    step without padding. `squares`: the sum of the squared lengths of its documents.
    """
    return 3 * (2 * multiplied * positions + _attention(config, squares))


def _attention(config: ModelConfig, squares: int) -> int:
    return 2 * squares * config.n_heads * config.head_width * config.n_layers


@dataclass(frozen=True)
class RankWork:
    """Describes a micro-batch on one rank, as far as its operations depend on it.

    So many `sequences` in its data replica, each filled by `documents` of such lengths, `labels`, rows at its experts
    in each layer. So many `sequence_ranks` share the positions, and of them `tp` the vocabulary; blocks are computed
    `again` so many times beside the forward and the backward pass.
    """

    sequences: int
    documents: tuple[int, ...]
    labels: int
    rows: int
    sequence_ranks: int
    tp: int
    again: int


def computed_flops(model: ModelConfig, vocabulary: int, layers: list[int], head: bool, work: RankWork) -> int:
    """Count the operations of a micro-batch in `layers` of the model, and in the `head` where the rank has it."""
    size, moe = model.d_model, model.moe
    attention = size * model.head_width * (2 * model.n_heads + 2 * model.n_kv_heads)
    positions = work.sequences * sum(work.documents) / work.sequence_ranks
    products = 0.0
    for layer in layers:
        products += positions * attention
        if moe is None or not moe.in_layer(layer):
            products += positions * 3 * size * model.intermediate_size
            continue
        products += positions * (size * moe.n_experts + 3 * size * moe.intermediate_size * moe.n_shared_experts)
        products += work.rows * 3 * size * moe.intermediate_size
    backend = model.attention_class
    scores = backend.flops(work.documents, model.n_heads, model.head_width) * work.sequences * len(layers)
    total = (3 + work.again) * 2 * products
    total += (1 + work.again + backend.backward_flops) * scores / work.sequence_ranks
    if head:
        total += 4 * 2 * work.labels * size * vocabulary / work.tp
    return round(total)
