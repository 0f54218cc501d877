"""The text path equals transformers' models with the same random weights."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from tests.models.random_batch import text_batch

VOCABULARY = 70
SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
OURS = {"d_model": 48, "hidden": 64, "layers": 3, "heads": 6, "kv_heads": 2, "tie_embeddings": False}


def llama() -> tuple[PreTrainedModel, ModelConfig]:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)), ModelConfig(**OURS)


def mixtral() -> tuple[PreTrainedModel, ModelConfig]:
    config = MixtralConfig(**SHAPE, **HEADS, num_local_experts=5, num_experts_per_tok=2)
    moe = MoEConfig(experts=5, top_k=2, hidden=64)
    return MixtralForCausalLM(config), ModelConfig(**OURS, rope_theta=1e6, norm_eps=1e-5, moe=moe)


def qwen3_moe(normalise: bool) -> tuple[PreTrainedModel, ModelConfig]:
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 2}
    config = Qwen3MoeConfig(**SHAPE, **HEADS, **experts, norm_topk_prob=normalise, head_dim=16)
    moe = MoEConfig(experts=6, top_k=3, hidden=24, every=2, normalise=normalise)
    return Qwen3MoeForCausalLM(config), ModelConfig(**OURS, head_dim=16, qk_norm=True, moe=moe)


@torch.no_grad()
def copy_weights(theirs: PreTrainedModel, ours: MultimodalModel) -> None:
    ours.embeddings.token.weight.copy_(theirs.model.embed_tokens.weight)
    ours.unembedding.weight.copy_(theirs.lm_head.weight)
    ours.decoder.norm.weight.copy_(theirs.model.norm.weight)
    for block, layer in zip(ours.decoder.blocks, theirs.model.layers):
        block.attention_norm.weight.copy_(layer.input_layernorm.weight)
        block.network_norm.weight.copy_(layer.post_attention_layernorm.weight)
        for ours_name, name in [("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")]:
            getattr(block.attention, ours_name).weight.copy_(getattr(layer.self_attn, f"{name}_proj").weight)
        if hasattr(layer.self_attn, "q_norm"):
            block.attention.query_norm.weight.copy_(layer.self_attn.q_norm.weight)
            block.attention.key_norm.weight.copy_(layer.self_attn.k_norm.weight)
        if hasattr(layer.mlp, "experts"):
            block.network.router.weight.copy_(layer.mlp.gate.weight)
            gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
            block.network.experts.gate.copy_(gate.transpose(1, 2))
            block.network.experts.up.copy_(up.transpose(1, 2))
            block.network.experts.down.copy_(layer.mlp.experts.down_proj.transpose(1, 2))
        else:
            for name in ("gate", "up", "down"):
                getattr(block.network, name).weight.copy_(getattr(layer.mlp, f"{name}_proj").weight)


@pytest.mark.parametrize(
    "pair",
    [llama, mixtral, lambda: qwen3_moe(True), lambda: qwen3_moe(False)],
    ids=["llama", "mixtral", "qwen3", "qwen3-raw"],
)
def test_logits_equal_transformers(pair):
    torch.manual_seed(0)
    theirs, config = pair()
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    ours = config.build(ModelInputs(VOCABULARY), seed=0).eval()
    copy_weights(theirs, ours)
    documents = [torch.randint(VOCABULARY, (n,)).tolist() for n in (17, 4, 40, 9)]
    packed = text_batch([documents[:2], documents[2:]], length=50)
    with torch.no_grad():
        logits = ours.logits(ours(packed).hidden)
        for b, at, ids in [(0, 0, documents[0]), (0, 17, documents[1]), (1, 0, documents[2]), (1, 40, documents[3])]:
            expected = theirs(torch.tensor([ids])).logits[0]
            alone = ours.logits(ours(text_batch([[ids]], length=len(ids))).hidden)[0]
            assert (alone - expected).abs().max() <= 1e-4
            assert (logits[b, at : at + len(ids)] - expected).abs().max() <= 1e-4
            assert expected.std() > 0.5
