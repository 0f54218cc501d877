"""Counts a model's parameters in closed form: known before any of them has memory."""

from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs


def parameter_count(config: ModelConfig, inputs: ModelInputs) -> int:
    """Count the parameters of tables and blocks.

    What embeds vectors and time, and the heads, are left out: under 1 % of a large model.
    """
    size, width = config.d_model, config.head_width
    attention = 2 * size * width * (config.n_heads + config.n_kv_heads) + 2 * width * config.qk_norm
    with_experts = 0
    dense = 3 * size * config.intermediate_size
    experts = 0
    if config.moe is not None:
        with_experts = sum(map(config.moe.in_layer, range(config.n_layers)))
        per_layer = config.moe.n_experts + config.moe.n_shared_experts
        experts = 3 * size * config.moe.intermediate_size * per_layer + size * (
            config.moe.n_experts + config.moe.shared_gate
        )
    blocks = (
        config.n_layers * (attention + 2 * size) + with_experts * experts + (config.n_layers - with_experts) * dense
    )
    tables = inputs.vocabulary_size * size * (1 if config.tie_embeddings else 2)
    return blocks + size + tables
