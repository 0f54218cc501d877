"""Turns documents of earlier checkpoint formats into those of today's."""

from typing import Any

from mmoe.checkpoint.tree import INTEGER_KEYS
from mmoe.optim.optimizer import is_block_matrix


def from_format_1(document: dict[str, Any]) -> dict[str, Any]:
    """Name the optimizer's states in a `document` of format 1 by parameter; it numbered them through each one's groups.

    Muon's groups had no names: its parameters were the matrices of the blocks that AdamW did not have, in the order
    of the model. A parameter that had no gradient yet had no state, and gets an empty one. The tensors keep the
    names under which they were written.
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
