"""Translates configs to and from Hugging Face's decoder families that the text path of a model can be.

========= ======= ======================================================= ===========
family    qk_norm experts                                                 class
========= ======= ======================================================= ===========
llama     no      none                                                    Llama
qwen3     yes     none                                                    Qwen3
mixtral   no      in every layer, weights that add up to 1                Mixtral
qwen3_moe yes     in every n-th layer, but not those of mlp_only_layers   Qwen3Moe
========= ======= ======================================================= ===========

What decides about the function of a model is either translated or refused by its name; only what acts in
training alone, or not on text, is left behind.
"""

from dataclasses import dataclass
from typing import Any

from mmoe.config.base import Config
from mmoe.errors import ConfigError, DataError
from mmoe.interchange.names import MIXTRAL, QWEN, ExpertNames
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.engines.grouped_mm import GroupedMMEngine
from mmoe.models.moe.layer import MoEConfig


@dataclass(frozen=True)
class Family:
    """Describes a Hugging Face family of decoders: its model type and class, and what sets its models apart.

    `defaults` are the values of keys that older configs of the family leave out.
    """

    model_type: str
    architecture: str
    qk_norm: bool
    experts: ExpertNames | None
    defaults: dict[str, Any]


_LATER = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
_QWEN = {**_LATER, "use_sliding_window": False}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", False, None, _LATER),
        Family("qwen3", "Qwen3ForCausalLM", True, None, {**_QWEN, "num_key_value_heads": 32, "head_dim": 128}),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            False,
            MIXTRAL,
            {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        ),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", True, QWEN, {**_QWEN, "num_key_value_heads": 4}),
    )
}

# Ours -> theirs, where only the name differs.
SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What theirs can be and ours cannot: the one value that both have.
FIXED_KEYS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# Keys of theirs that are translated below, and that change nothing of what text goes through when it is read: how a
# model is trained, generated from, stored or run. Any other key may: it is refused.
_READ = {*FIXED_KEYS, "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
_READ |= {"num_key_value_heads", "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "layer_types"}
_READ |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_READ |= {"sliding_window", "use_sliding_window", "moe_intermediate_size", "num_experts", "num_local_experts"}
_READ |= {"num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
_UNUSED = {"attention_dropout", "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp"}
_UNUSED |= {"max_position_embeddings", "max_window_layers", "use_cache", "output_router_logits", "output_attentions"}
_UNUSED |= {"output_hidden_states", "return_dict", "use_return_dict", "architectures", "transformers_version"}
_UNUSED |= {"torch_dtype", "dtype", "torchscript", "use_bfloat16", "_name_or_path", "name_or_path", "_commit_hash"}
_UNUSED |= {
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
}
_UNUSED |= {"experts_implementation", "_experts_implementation", "chunk_size_feed_forward", "tokenizer_class"}
_UNUSED |= {f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "decoder_start")}
_UNUSED |= {"is_decoder", "is_encoder_decoder", "id2label", "label2id", "problem_type", "task_specific_params"}
_UNUSED |= {"temperature", "top_p", "top_k", "do_sample", "max_length", "min_length", "repetition_penalty"}
_UNUSED |= {"unsloth_fixed", "unsloth_version", "model_max_length"}
_OWN_PREFIX = "mmoe_"  # of keys that an export adds

# Keys of ours that are translated, and keys that change nothing of what text goes through when it is read.
TRANSLATED = {*SIZES, "head_dim", "intermediate_size", "rope_theta", "qk_norm", "moe"}
NEUTRAL = {"bidirectional_slices", "attention", "init_std", "contrast_dim"}
TRANSLATED_MOE = {
    "n_experts", "top_k", "intermediate_size", "norm_topk_prob", "layer_freq", "first_k_dense", "score_func"
}  # fmt: skip
NEUTRAL_MOE = {"expert_backend", "dispatcher", "router_noise", "drop_policy", "token_group_alignment"}
REMEDIES = {
    "n_shared_experts": "train with 0 (more top_k gives the same active parameters)",
    "capacity_factor": "it drops nothing: evaluate the run with null in its config.yaml, and export it so",
    "score_func": "train with softmax",
    "routed_scaling_factor": "train with 1.0",
    "n_group": "train with 1",
    "bias_update_rate": "train with 0.0 and a balance loss",
}


def family_of(config: ModelConfig) -> Family:
    """Return the family that a model of `config` is; raise ConfigError naming what none has, and the remedy."""
    moe = config.moe
    family = next(f for f in FAMILIES.values() if f.qk_norm == config.qk_norm and (f.experts is None) == (moe is None))
    name = family.architecture.removesuffix("ForCausalLM")
    _refuse_unknown(name, "model", config, TRANSLATED | NEUTRAL)
    if family.model_type == "llama" and config.d_model % config.n_heads:
        raise _inexpressible(
            name,
            "model.n_heads",
            f"{config.n_heads}, of which model.d_model {config.d_model} is not a multiple",
            "train with heads that divide d_model, or with model.qk_norm true, which makes it a Qwen3, which can",
        )
    if moe is None:
        return family
    _refuse_unknown(name, "model.moe", moe, TRANSLATED_MOE | NEUTRAL_MOE)
    if moe.score_func not in ("softmax", "softmax_topk"):
        raise _inexpressible(name, "model.moe.score_func", moe.score_func, REMEDIES["score_func"])
    if family.model_type == "mixtral":
        dense = [number for number in range(config.n_layers) if not moe.in_layer(number)]
        remedy = "train with model.qk_norm true, which makes it a Qwen3Moe, which has that"
        if dense:
            key, value = ("layer_freq", moe.layer_freq) if moe.layer_freq > 1 else ("first_k_dense", moe.first_k_dense)
            raise _inexpressible(name, f"model.moe.{key}", f"{value} (layer {dense[0]} is dense)", remedy)
        if not moe.norm_topk_prob:
            raise _inexpressible(name, "model.moe.norm_topk_prob", False, remedy)
    return family


def _refuse_unknown(family: str, path: str, config: Config, known: set[str]) -> None:
    """Every key that is neither translated nor neutral must have its default: a new one is refused, not forgotten."""
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        if key not in known and value != field.get_default(call_default_factory=True):
            raise _inexpressible(family, f"{path}.{key}", value, REMEDIES.get(key, "train with its default"))


def _inexpressible(family: str, key: str, value: Any, remedy: str) -> ConfigError:
    return ConfigError(f"{key} is {value}, which a {family} of Hugging Face cannot express; {remedy}")


def to_huggingface(config: ModelConfig, vocabulary_size: int, positions: int) -> dict[str, Any]:
    """Return the `config.json` of a model with `vocabulary_size` ids, trained on sequences of `positions`."""
    family = family_of(config)
    tree: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    tree |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    tree |= {"head_dim": config.head_width, "intermediate_size": config.intermediate_size}
    tree |= {"vocab_size": vocabulary_size, "max_position_embeddings": positions, **FIXED_KEYS}
    # transformers before 5 reads the first, later ones the second
    tree |= {"rope_theta": config.rope_theta}
    tree |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    moe = config.moe
    if moe is None:
        return tree
    if family.model_type == "mixtral":
        tree |= {"intermediate_size": moe.intermediate_size, "num_local_experts": moe.n_experts, "sliding_window": None}
    else:
        tree |= {
            "moe_intermediate_size": moe.intermediate_size,
            "num_experts": moe.n_experts,
            "use_sliding_window": False,
        }
        tree |= {"decoder_sparse_step": moe.layer_freq, "mlp_only_layers": list(range(moe.first_k_dense))}
        tree |= {"norm_topk_prob": moe.norm_topk_prob or moe.score_func == "softmax_topk"}
    return tree | {"num_experts_per_tok": moe.top_k}


def from_huggingface(tree: dict[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Return the family and the model that a `config.json` describes.

    `tree` is the content of the file, `where` names it in messages. Raises DataError naming the key that ours cannot
    express.
    """
    family = FAMILIES.get(tree.get("model_type", ""))
    if family is None:
        raise DataError(f"{where}: model_type is {tree.get('model_type')!r}; mmoe reads {', '.join(FAMILIES)}")
    for key, value in tree.items():
        if value is not None and key not in _READ | _UNUSED and not key.startswith(_OWN_PREFIX):
            raise DataError(
                f"{where}: {key} is {value!r}, a key that mmoe does not know, so it may make the model another one; "
                "choose a checkpoint without it, or delete it there if it changes nothing"
            )
    rope_theta = _rope_theta(tree, family.defaults["rope_theta"], where)
    tree = {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": False, **family.defaults, **tree}
    for key, value in FIXED_KEYS.items():
        if tree.get(key, value) != value:
            raise _unsupported(where, key, tree[key], f"ours has {value} alone")
    if tree.get("use_sliding_window", True) and tree.get("sliding_window") is not None:
        raise _unsupported(where, "sliding_window", tree["sliding_window"], _WHOLE)
    if not set(tree.get("layer_types") or ()) <= {"full_attention"}:
        raise _unsupported(where, "layer_types", tree["layer_types"], _WHOLE)
    try:
        sizes = {ours: tree[theirs] for ours, theirs in SIZES.items() if theirs != "num_key_value_heads"}
        config = ModelConfig(
            **sizes,
            n_kv_heads=tree["num_key_value_heads"] or tree["num_attention_heads"],
            head_dim=tree["head_dim"],
            intermediate_size=tree["intermediate_size"],
            rope_theta=rope_theta,
            qk_norm=family.qk_norm,
            moe=None if family.experts is None else _experts(family, tree, where),
        )
    except KeyError as error:
        raise DataError(f"{where} has no {error.args[0]}; it is not the config.json of a {family.model_type}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} describes a model that mmoe cannot be ({' '.join(str(error).split())})") from error
    return family, config


def _rope_theta(tree: dict[str, Any], default: float, where: str) -> float:
    """The base of plain rotary positions, of which every key that speaks of them must say the same.

    transformers before 5 reads `rope_scaling` and the `rope_theta` beside it, later ones `rope_scaling`, and where
    there is none `rope_parameters`, in which `rope_theta` goes before the one beside it.
    """
    said = {"rope_theta": tree.get("rope_theta")}
    if tree.get("partial_rotary_factor") not in (None, 1):
        raise _unsupported(where, "partial_rotary_factor", tree["partial_rotary_factor"], _PLAIN)
    for key in ("rope_parameters", "rope_scaling"):
        rope = tree.get(key) or {}
        if not isinstance(rope, dict):
            raise _unsupported(where, key, rope, _PLAIN)
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        kinds = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
        if kinds or rope.get("partial_rotary_factor") not in (None, 1) or rope.keys() - known:
            raise _unsupported(where, key, rope, _PLAIN)
        said[f"{key}.rope_theta"] = rope.get("rope_theta")
    said = {key: value for key, value in said.items() if value is not None}
    (first, theta), *others = said.items() or [("", default)]
    for key, value in others:
        if value != theta:
            raise DataError(
                f"{where}: {first} is {theta}, but {key} is {value}; keep the one that the model was trained with"
            )
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise _unsupported(where, first, theta, "it is a number")
    return float(theta)


def _experts(family: Family, tree: dict[str, Any], where: str) -> MoEConfig | None:
    """None where no layer has experts."""
    mixtral = family.model_type == "mixtral"
    hidden = tree["intermediate_size" if mixtral else "moe_intermediate_size"]
    experts = tree["num_experts"] if "num_experts" in tree else tree["num_local_experts"]
    fast = not any(width % GroupedMMEngine.multiple for width in (hidden, tree["hidden_size"]))
    moe = MoEConfig(
        n_experts=experts,
        top_k=tree["num_experts_per_tok"],
        intermediate_size=hidden,
        norm_topk_prob=mixtral or tree.get("norm_topk_prob", False),
        layer_freq=1 if mixtral else tree.get("decoder_sparse_step", 1),
        expert_backend="grouped_mm" if fast else "loop",
    )
    only_dense = set() if mixtral else set(tree.get("mlp_only_layers") or ())
    layers = range(tree["num_hidden_layers"])
    sparse = [number for number in layers if moe.in_layer(number) and number not in only_dense]
    if not sparse:
        return None
    # The same layers, described by how many dense ones come first.
    first = 0 if sparse == [number for number in layers if moe.in_layer(number)] else sparse[0]
    moe = moe.model_copy(update={"first_k_dense": first})
    if sparse != [number for number in layers if moe.in_layer(number)]:
        raise _unsupported(where, "mlp_only_layers", sorted(only_dense), "ours can only have dense layers first")
    return moe


_PLAIN = "ours has plain rotary positions alone"
_WHOLE = "our attention sees the whole document"


def _unsupported(where: str, key: str, value: Any, reason: str) -> DataError:
    return DataError(f"{where}: {key} is {value!r}, but {reason}; choose a checkpoint without it")
