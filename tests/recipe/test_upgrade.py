"""Configs of runs that earlier versions began: the keys of today, and a run that goes on."""

from typing import Any

import pytest
import yaml

from mmoe.config.load import dump, load
from mmoe.errors import ConfigError
from mmoe.recipe.config import RunConfig
from mmoe.recipe.upgrade import today_key, upgrade_config
from mmoe.training.run import read_config

EXPERTS = {
    "experts": 4, "top_k": 2, "hidden": 8, "shared_experts": 1, "capacity_factor": 2.0, "drop": "probability",
    "group_multiple": 2, "engine": "loop", "score": "sigmoid", "normalise": False, "scale": 2.0, "noise": 0.5,
    "bias_rate": 0.1, "every": 2, "dense_first": 1, "groups": {"count": 2, "per_token": 1, "score": "max"},
}  # fmt: skip
OURS = {
    "n_experts": 4, "top_k": 2, "intermediate_size": 8, "n_shared_experts": 1, "capacity_factor": 2.0,
    "drop_policy": "probs", "token_group_alignment": 2, "expert_backend": "loop", "score_func": "sigmoid",
    "norm_topk_prob": False, "routed_scaling_factor": 2.0, "router_noise": 0.5, "bias_update_rate": 0.1,
    "layer_freq": 2, "first_k_dense": 1, "n_group": 2, "topk_group": 1, "group_score": "max",
}  # fmt: skip


OPTIONS = {
    "picture_quality": 90,
    "prepare": {"filters": {"picture": {"min_side": 8}}, "dedup": {"picture_bits": 3}, "bounds": {"sound_rate": 9}},
}


def earlier(**model: Any) -> dict[str, Any]:
    return {
        "data": {
            "sources": {"a": {"kind": "text", "shards": "a", "options": OPTIONS}},
            "sequence_length": 64,
            "bounds": {"film_seconds": 5, "picture_pixels": 7},
        },
        "tokenizers": {"audio": {"mel": {"normalise_level": False}}},
        "model": {"d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 24, **model},
        "losses": {"balance": {"sequence": 0.5}, "router_z": 0.25},
        "optim": {"lr": {"peak": 1e-3}, "schedule": {"kind": "cosine", "cooldown": {"steps": 3}}},
        "training": {"run": "r", "micro_batch_sequences": 1, "global_batch_positions": 64, "budget_positions": 640},
    }


def test_the_config_of_an_earlier_run_has_the_keys_of_today_and_the_values_it_had(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier(moe=EXPERTS)))
    with pytest.raises(ConfigError, match=r"model\.moe\.every is not"):  # as in a recipe
        load(RunConfig, tmp_path / "config.yaml")
    config = read_config(tmp_path)
    assert config.model.moe.model_dump(include=set(OURS)) == OURS
    model, losses = config.model, config.losses
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.intermediate_size) == (2, 2, 1, 24)
    assert losses.load_balance.sequence == 0.5 and losses.z_loss == 0.25 and config.optim.schedule.hold.steps == 3
    assert config.tokenizers.audio.mel.normalize_level is False
    assert config.data.sources["a"].options == {
        "image_quality": 90,
        "prepare": {"filters": {"image": {"min_side": 8}}, "dedup": {"image_bits": 3}, "bounds": {"audio_rate": 9}},
    }
    assert (config.data.bounds.video_seconds, config.data.bounds.image_pixels) == (5, 7)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read_config(tmp_path) == config


def test_without_experts_or_with_nonsense_nothing_is_invented(tmp_path):
    tree = earlier(moe=None)
    assert upgrade_config(tree)["model"]["moe"] is None and upgrade_config(upgrade_config(tree)) == upgrade_config(tree)
    assert upgrade_config({"model": 3, "losses": None}) == {"model": 3, "losses": None}
    assert upgrade_config({"model": {"moe": {"groups": None}}}) == {"model": {"moe": {}}}


def test_recorded_changes_name_the_keys_of_today():
    assert today_key("optim.schedule.cooldown.fraction") == "optim.schedule.hold.fraction"
    assert today_key("losses.balance") == "losses.load_balance"
    assert today_key("model.hidden_other") == "model.hidden_other" and today_key("optim.lr.peak") == "optim.lr.peak"
