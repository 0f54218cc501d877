"""The text path equals transformers' models with the same random weights, read from the files that they write."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mmoe.interchange.huggingface import Pretrained
from tests.models.random_batch import text_batch

VOCABULARY = 70
SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}


def llama(**changes) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, rope_theta=5e5, **changes))


def qwen3(**changes) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS, head_dim=16, **changes))


def mixtral(**changes) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **HEADS, num_local_experts=5, num_experts_per_tok=2, **changes))


def qwen3_moe(**changes) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS, **changes))


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3-moe": lambda: qwen3_moe(norm_topk_prob=True, decoder_sparse_step=2),
    "qwen3-moe-raw": lambda: qwen3_moe(norm_topk_prob=False, mlp_only_layers=[0]),
}


def random_model(name: str) -> PreTrainedModel:
    """Weights large enough that every one of them counts in the logits."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    ours = Pretrained(tmp_path).build().eval()
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
