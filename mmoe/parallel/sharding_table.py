"""Says which parameter is cut along which dimension over which axis.

`parallelize` applies it, `mmoe.planning` reads it. First tp or ep cuts what is in `CUTS`. Then FSDP2 cuts every
parameter among the ranks that share its unit, the module that it gathers at once.
"""

from typing import NamedTuple


class Cut(NamedTuple):
    """Names the axis of the mesh whose ranks share a parameter, and the dimension along which they cut it."""

    axis: str
    dim: int


class Unit(NamedTuple):
    """Describes a module that FSDP2 gathers at once, over `axis`, its parameters cut along `dim`.

    The root has the path "". With `matrices` it is nothing but matrices, which are gathered in the precision of the
    products.
    """

    path: str
    axis: str = "fsdp"
    dim: int = 0
    matrices: bool = False


# By a parameter's name in the model, or in its block. Over tp, dimension 0 is of heads, columns or ids, and 1 leaves
# each rank a part of a sum; over ep, 0 is of experts.
CUTS = {
    "embeddings.token.weight": Cut("tp", 0),
    "unembedding.weight": Cut("tp", 0),
    "attention.query.weight": Cut("tp", 0),
    "attention.key.weight": Cut("tp", 0),
    "attention.value.weight": Cut("tp", 0),
    "attention.output.weight": Cut("tp", 1),
    "feed_forward.gate.weight": Cut("tp", 0),
    "feed_forward.up.weight": Cut("tp", 0),
    "feed_forward.down.weight": Cut("tp", 1),
    "feed_forward.experts.gate": Cut("ep", 0),
    "feed_forward.experts.up": Cut("ep", 0),
    "feed_forward.experts.down": Cut("ep", 0),
}
FEW_HEADS = ("attention.key.weight", "attention.value.weight")  # whole on every rank where ranks outnumber their heads

DENSE_UNIT = Unit("feed_forward", matrices=True)
# By the beginning of a parameter's name in its block. Experts are cut by width: there may be fewer of them than ranks.
UNITS = {
    "feed_forward.experts.": Unit("feed_forward.experts", "edp", 1, matrices=True),
    "feed_forward.shared.": Unit("feed_forward.shared", matrices=True),
    **dict.fromkeys(("feed_forward.gate.", "feed_forward.up.", "feed_forward.down."), DENSE_UNIT),
}


def cut_of(name: str, kv_heads: int, tp: int) -> Cut | None:
    """Look up the cut of a parameter by its name in the model or in its block; None where FSDP2 alone cuts it."""
    within = _split(name)[1]
    return None if within in FEW_HEADS and kv_heads % tp else CUTS.get(within)


def unit_of(name: str) -> Unit:
    """Look up the unit of a parameter by its name in the model; its path is that in the model."""
    block, within = _split(name)
    if not block:
        return Unit("")
    found = next((unit for start, unit in UNITS.items() if within.startswith(start)), None)
    return found._replace(path=f"{block}.{found.path}") if found else Unit(block)


def _split(name: str) -> tuple[str, str]:
    """Split the path of a parameter's block, "" where it is in none, from its name within."""
    parts = name.split(".")
    in_block = parts[:2] == ["decoder", "blocks"]
    return (".".join(parts[:3]), ".".join(parts[3:])) if in_block else ("", name)
