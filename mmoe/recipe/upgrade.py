"""Gives the config of a run that an earlier version began the keys of today, so that the run goes on."""

from typing import Any

from mmoe.config.load import rename_keys

# Keys by what they are called now, where that is not what they were called; all were renamed at once.
RENAMED_KEYS = {
    "model.layers": "n_layers",
    "model.heads": "n_heads",
    "model.kv_heads": "n_kv_heads",
    "model.hidden": "intermediate_size",
    "model.moe.experts": "n_experts",
    "model.moe.hidden": "intermediate_size",
    "model.moe.shared_experts": "n_shared_experts",
    "model.moe.drop": "drop_policy",
    "model.moe.group_multiple": "token_group_alignment",
    "model.moe.engine": "expert_backend",
    "model.moe.score": "score_func",
    "model.moe.normalise": "norm_topk_prob",
    "model.moe.scale": "routed_scaling_factor",
    "model.moe.noise": "router_noise",
    "model.moe.bias_rate": "bias_update_rate",
    "model.moe.every": "layer_freq",
    "model.moe.dense_first": "first_k_dense",
    "losses.balance": "load_balance",
    "losses.router_z": "z_loss",
    "optim.schedule.cooldown": "hold",
    "tokenizers.audio.mel.normalise_level": "normalize_level",
    "data.bounds.film_seconds": "video_seconds",
    "data.bounds.film_frames": "video_frames",
    "data.bounds.film_pixels": "video_pixels",
    "data.bounds.picture_pixels": "image_pixels",
    "data.bounds.sound_seconds": "audio_seconds",
    "data.bounds.sound_rate": "audio_rate",
    "data.bounds.sound_channels": "audio_channels",
}
_OPTIONS = {  # within data.sources.*.options
    "picture_quality": "image_quality",
    "prepare.filters.picture": "image",
    "prepare.dedup.picture_bits": "image_bits",
    **{f"prepare.bounds.{key.rpartition('.')[2]}": now for key, now in RENAMED_KEYS.items() if ".bounds." in key},
}
_GROUPS = {"count": "n_group", "per_token": "topk_group", "score": "group_score"}  # of model.moe.groups


def today_key(key: str) -> str:
    """Return what a dotted key, or the key of a mapping that it stands in, is called today."""
    for before, now in RENAMED_KEYS.items():
        if key == before or key.startswith(f"{before}."):
            return f"{before.rpartition('.')[0]}.{now}{key.removeprefix(before)}"
    return key


def upgrade_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the `tree` of a run's config.yaml with the keys and values of today; one of today as it is."""
    renamed = rename_keys(tree, RENAMED_KEYS)
    data = renamed.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for source in sources.values() if isinstance(sources, dict) else ():
        if isinstance(source, dict) and isinstance(source.get("options"), dict):
            source["options"] = rename_keys(source["options"], _OPTIONS)
    model = renamed.get("model")
    moe = model.get("moe") if isinstance(model, dict) else None
    if isinstance(moe, dict):
        groups = moe.pop("groups", None)
        moe |= {_GROUPS.get(key, key): value for key, value in groups.items()} if isinstance(groups, dict) else {}
        if moe.get("drop_policy") == "probability":
            moe["drop_policy"] = "probs"
    return renamed
