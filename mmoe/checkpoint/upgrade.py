"""Turns documents of earlier checkpoint formats into those of today's."""

import re
from typing import Any

from mmoe.checkpoint.tree import INTEGER_KEYS
from mmoe.config.load import rename_keys
from mmoe.optim.optimizer import is_block_matrix

# The names of parameters and buffers before format 4, as patterns, with those of today; applied in this order.
RENAMED_PARAMETERS = {
    r"^(decoder\.blocks\.\d+\.)network(?=\.)": r"\1feed_forward",
    r"^(decoder\.blocks\.\d+\.)network_norm(?=\.)": r"\1ffn_norm",
    r"^(decoder\.blocks\.\d+\.feed_forward\.router\.)choice_bias$": r"\1expert_bias",
}

# What is not a tensor: keys by where they stand.
RENAMED_FIELDS = {
    "trainer.stream.plan.owed": "deficit",
    "callbacks.metrics.totals.expert_choices": "slots_routed",
    "callbacks.metrics.totals.expert_choices_dropped": "slots_dropped",
}


def upgrade_document(document: dict[str, Any], version: int) -> dict[str, Any]:
    """Turn a `document` of format `version` into one of today's; the tensors keep the names they were written under."""
    if version == 1:
        document = _name_states(document)
    return _rename(document) if version < 4 else document


def _rename(document: dict[str, Any]) -> dict[str, Any]:
    """Give parameters, the plan of the data and the counts of slots the names of format 4."""
    renamed = rename_keys(document, RENAMED_FIELDS)
    for section in ("model", "optimizer"):
        if section in document:
            renamed[section] = {_today(name): value for name, value in document[section].items()}
    return renamed


def _today(name: str) -> str:
    for before, now in RENAMED_PARAMETERS.items():
        name = re.sub(before, now, name)
    return name


def _name_states(document: dict[str, Any]) -> dict[str, Any]:
    """Name the optimizer's states in a `document` of format 1 by parameter; it numbered them through each one's groups.

    Muon's groups had no names: its parameters were the matrices of the blocks that AdamW did not have, in the order
    of the model. A parameter that had no gradient yet had no state, and gets an empty one.
    """
    if "adamw" not in document.get("optimizer", {}):
        return document
    states: dict[str, Any] = {}
    for part in document["optimizer"].values():
        held = part["state"].get(INTEGER_KEYS, {})
        for group in part["param_groups"]:
            blocks = [name for name in document["model"] if is_block_matrix(name, 2)]  # AdamW names the others
            named = group.get("param_names") or [name for name in blocks if name not in states]
            states |= {name: held.get(str(number), {}) for number, name in zip(group["params"], named)}
    return document | {"optimizer": states}
