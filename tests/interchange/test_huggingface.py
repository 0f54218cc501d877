"""Weights and configs go to Hugging Face's files and back bit for bit, and what cannot go is refused by its name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mmoe.errors import ConfigError, DataError
from mmoe.interchange.families import family_of, from_huggingface, to_huggingface
from mmoe.interchange.huggingface import Pretrained, save
from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoEConfig
from tests.models.random_batch import INPUTS, text_batch
from tests.models.test_parity import MODELS, random_model

OURS = {
    "d_model": 48,
    "intermediate_size": 64,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "rope_theta": 3e4,
    "norm_eps": 1e-5,
}
TEXT_ALONE = ModelInputs(70)
MOE = {"n_experts": 6, "top_k": 3, "intermediate_size": 24}
CONFIGS = {
    "llama": ModelConfig(**OURS, tie_embeddings=False),
    "qwen3": ModelConfig(**OURS, head_dim=16, qk_norm=True),
    "mixtral": ModelConfig(**{**OURS, "intermediate_size": 24}, moe=MoEConfig(**MOE), tie_embeddings=False),
    "mixtral-softmax-after": ModelConfig(
        **{**OURS, "intermediate_size": 24}, moe=MoEConfig(**MOE, score_func="softmax_topk")
    ),
    "qwen3_moe": ModelConfig(**OURS, qk_norm=True, moe=MoEConfig(**MOE, layer_freq=2, norm_topk_prob=False)),
    "qwen3_moe-dense-first": ModelConfig(**OURS, qk_norm=True, moe=MoEConfig(**MOE, first_k_dense=1)),
}


def randomized(config, inputs=TEXT_ALONE):
    model = config.build(inputs, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_our_weights_come_back_bit_for_bit(name, dtype, sharded, tmp_path):
    model = randomized(CONFIGS[name]).to(dtype)
    save(model, tmp_path, positions=50, shard_bytes=20_000 if sharded else 10**9)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == sharded
    back = Pretrained(tmp_path).build()
    for key, value in model.state_dict().items():
        if key.startswith(("decoder", "embeddings.token", "unembedding")):
            assert back.state_dict()[key].dtype is dtype and torch.equal(value, back.state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_their_weights_come_back_bit_for_bit(name, dtype, tmp_path):
    random_model(name).to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    save(Pretrained(tmp_path / "theirs").build(), tmp_path / "ours", positions=50)
    theirs = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(file)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype is dtype and torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_our_files_and_gives_our_logits(name, tmp_path):
    """Of a model with images, audio and actions too: the text path alone is written."""
    ours = randomized(CONFIGS[name], replace(INPUTS, vocabulary_size=70))
    report = save(ours, tmp_path, positions=50, shard_bytes=50_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    theirs.eval()
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == report.architecture == family_of(CONFIGS[name]).architecture
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    assert report.parameters + sum(report.left_out.values()) == sum(p.numel() for p in ours.parameters())
    assert report.left_out.keys() >= {"embeddings.values", "embeddings.time", "action", "contrastive"}
    documents = [torch.randint(70, (n,)).tolist() for n in (17, 4, 25)]
    with torch.no_grad():
        packed = ours.logits(ours(text_batch([documents], length=50)).hidden)[0]
        at = 0
        for ids in documents:
            expected = theirs(torch.tensor([ids])).logits[0]
            assert (packed[at : at + len(ids)] - expected).abs().max() <= 1e-4 and expected.std() > 0.1
            at += len(ids)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_files_with_fused_experts_are_read_too(name, tmp_path):
    """The layout of transformers 5's modules, which `save_original_format=False` writes."""
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "each")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "fused" / "model.safetensors"))
    each, fused = (Pretrained(tmp_path / kind).build().state_dict() for kind in ("each", "fused"))
    for key, value in each.items():
        assert torch.equal(value, fused[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_come_back(name):
    tree = json.loads(json.dumps(to_huggingface(CONFIGS[name], 70, 50)))
    _, back = from_huggingface(tree, "config.json")
    expected = CONFIGS[name].model_copy(update={"head_dim": CONFIGS[name].head_width})
    if expected.moe is not None and expected.moe.score_func == "softmax_topk":  # the same function by its other name
        expected = expected.model_copy(update={"moe": expected.moe.model_copy(update={"score_func": "softmax"})})
    assert back == expected


@pytest.mark.parametrize(
    "moe, qk_norm, sentence",
    [
        (
            {"n_shared_experts": 1},
            True,
            "model.moe.n_shared_experts is 1, which a Qwen3Moe .* cannot express; train with",
        ),
        ({"n_shared_experts": 2}, False, "model.moe.n_shared_experts is 2, which a Mixtral"),
        ({"capacity_factor": 1.25}, True, "model.moe.capacity_factor is 1.25, .* null in its config.yaml"),
        ({"score_func": "sigmoid"}, True, "model.moe.score_func is sigmoid"),
        ({"routed_scaling_factor": 2.0}, True, "model.moe.routed_scaling_factor is 2.0"),
        ({"n_group": 2}, True, "model.moe.n_group is 2"),
        ({"bias_update_rate": 0.001}, True, "model.moe.bias_update_rate is 0.001"),
        ({"layer_freq": 2}, False, "model.moe.layer_freq is 2 .layer 0 is dense., .* Mixtral .* model.qk_norm true"),
        ({"first_k_dense": 1}, False, "model.moe.first_k_dense is 1 .layer 0 is dense.,"),
        ({"norm_topk_prob": False}, False, "model.moe.norm_topk_prob is False, .* Mixtral"),
    ],
)
def test_what_a_family_cannot_express_is_refused_before_anything_is_written(moe, qk_norm, sentence, tmp_path):
    tree = {**OURS, "qk_norm": qk_norm, "moe": {**MOE, **moe}}
    model = ModelConfig.model_validate(tree).build(ModelInputs(70), seed=0)
    with pytest.raises(ConfigError, match=sentence):
        save(model, tmp_path / "out", positions=50)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; mmoe reads llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 512, "use_sliding_window": True}, "sliding_window is 512"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters is .*yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ({"rope_scaling": {"rope_type": "default", "type": "dynamic"}}, "rope_scaling is .*dynamic"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*factor"),
        ({"rope_scaling": {"rope_theta": 7.0}}, "rope_theta is 30000.0, but rope_scaling.rope_theta is 7.0; keep"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, but rope_parameters.rope_theta is 30000.0; keep the one"),
        ({"rope_theta": "many", "rope_parameters": None}, "rope_theta is 'many'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 3e4}}}, "rope_parameters is .*full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 3e4}}, "rope_parameters is .*partial"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is .*sliding"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, a key that mmoe does not know"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*fp8"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is .1., but ours can only have dense layers first"),
        ({"num_hidden_layers": None}, "describes a model that mmoe cannot be"),
    ],
)
def test_a_config_that_ours_cannot_be_is_refused(changes, sentence):
    config = ModelConfig(**OURS, qk_norm=True, moe=MoEConfig(**MOE))
    with pytest.raises(DataError, match=sentence):
        from_huggingface(to_huggingface(config, 70, 50) | changes, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "default", "rope_theta": 3e4}, "partial_rotary_factor": 1.0},
        {"rope_parameters": None},
        {"rope_scaling": None, "rope_theta": None},
        {"layer_types": ["full_attention"] * 3, "sliding_window": 4096},
        {"attention_dropout": 0.1, "pretraining_tp": 2, "transformers_version": "4.57.3", "mmoe_text_ids": [29, 70]},
    ],
)
def test_what_changes_nothing_beside_the_model_is_passed_over(changes):
    config = ModelConfig(**OURS, qk_norm=True, moe=MoEConfig(**MOE))
    tree = to_huggingface(config, 70, 50)
    assert from_huggingface(tree | changes, "config.json") == from_huggingface(tree, "config.json")


UNEVEN = {**OURS, "d_model": 40, "head_dim": 16}  # 6 heads


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "qwen3_moe"])
def test_heads_that_do_not_divide_the_width_run_in_transformers(name, tmp_path):
    moe = {"moe": MoEConfig(**MOE)} if name in ("mixtral", "qwen3_moe") else {}
    ours = randomized(ModelConfig(**UNEVEN, qk_norm=name != "mixtral", **moe))
    save(ours, tmp_path, positions=50)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == name
    ids = torch.randint(70, (17,)).tolist()
    with torch.no_grad():
        packed = ours.logits(ours(text_batch([[ids]], length=17)).hidden)[0]
        assert (packed - theirs(torch.tensor([ids])).logits[0]).abs().max() <= 1e-4


def test_a_llama_whose_heads_do_not_divide_its_width_is_refused_with_a_remedy(tmp_path):
    sentence = "model.n_heads is 6, of which model.d_model 40 .* a Llama .* cannot express; .* model.qk_norm true"
    with pytest.raises(ConfigError, match=sentence):
        save(randomized(ModelConfig(**UNEVEN)), tmp_path / "out", positions=50)
    assert not (tmp_path / "out").exists()


def test_files_that_are_broken_or_of_another_model_are_refused(tmp_path):
    save(randomized(CONFIGS["llama"]), tmp_path, positions=50)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(weights | {name: torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=f"1 tensors that its config.json does not speak of .{name}"):
        Pretrained(tmp_path).build()
    save_file({k: v for k, v in weights.items() if "norm" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="has no tensor model.layers.0.input_layernorm.weight"):
        Pretrained(tmp_path).build()
    save_file(weights | {"model.norm.weight": torch.zeros(47)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"decoder.norm.weight is \[47\], the model has \[48\]"):
        Pretrained(tmp_path).build()
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        Pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights .* are not read"):
        Pretrained(tmp_path)


def test_an_earlier_export_is_replaced_and_anything_else_is_kept(tmp_path):
    model = randomized(CONFIGS["llama"])
    save(model, tmp_path, positions=50, shard_bytes=20_000)
    save(model, tmp_path, positions=50)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="notes.txt, which no export wrote"):
        save(model, tmp_path, positions=50)
    assert (tmp_path / "model.safetensors").is_file()
