"""Says what boards show of a record, grouped alike on all of them."""

from collections.abc import Iterator

import numpy as np

from mmoe.monitoring.record import StepRecord

BY_EXPERT = ("expert_load", "expert_importance", "router_grad_norm")  # a curve for each layer and expert

# Names, or what they begin with (then ending in _ or /), by the group that they are shown in.
_GROUPS = {
    "loss": "loss loss_ ce_ contrastive_ action_from_",
    "optim": "lr grad_norm",
    "data": "positions tokens packing_efficiency planned_positions/ served_positions/ lost/ quarantined/ storage/",
    "speed": "tokens_per_second positions_per_second seconds_per_step data_wait_seconds wall_seconds peak_memory_bytes "
    "mfu mfu_peak_flops",
    "routing": "drop_rate load_max_over_mean router_entropy slots_routed slots_dropped",
}
_GROUP = {name: group for group, names in _GROUPS.items() for name in names.split()}


def tag(name: str) -> str:
    """Return the name by which boards show a scalar: ``loss/loss_ce``, ``data/lost/drive/cut``.

    ``eval/...`` stays as it is; names of no known group go to ``other/``.
    """
    if name.startswith("eval/"):
        return name
    prefixes = (prefix for prefix in _GROUP if prefix[-1] in "_/" and name.startswith(prefix))
    group = _GROUP.get(name) or _GROUP.get(next(prefixes, ""))
    return f"{group or 'other'}/{name}"


def chart_groups(record: StepRecord) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of every point that a record adds to a board: its scalars, and its tables by expert."""
    for name, value in record.scalars.items():
        yield tag(name), value
    for name in BY_EXPERT:
        if name not in record.tables:
            continue
        table = record.tables[name]
        for (layer, expert), value in np.ndenumerate(table.reshape(len(table), -1, table.shape[-1]).sum(1)):
            yield f"routing/{name}/layer{layer}/expert{expert}", float(value)
