"""What a rank holds of every parameter: the shapes that tensor, expert and FSDP sharding leave, without making them.

The rules are those of `mmoe.parallel.parallelize`, written down a second time as arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from torch import nn

from mmoe.models.decoder import ModelConfig
from mmoe.parallel.mesh import Degrees
from mmoe.recipe.config import RunConfig

TABLES = ("embeddings.token.weight", "unembedding.weight")


@dataclass(frozen=True)
class Place:
    """Where a rank is on the axes that cut parameters unevenly."""

    fsdp: int = 0
    tp: int = 0


@dataclass(frozen=True)
class Shard:
    """A parameter on one rank of `tp` and `ep` has `shape`; FSDP cuts its dimension `cut` in `parts`.

    `unit` names the FSDP module that gathers it, `width` bytes an element then has. `copied`: every rank of tp has it.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    cut: int
    parts: int
    width: int
    copied: bool
    expert: bool

    @property
    def chunk(self) -> int:
        """Elements of the largest shard, which is what every rank sends."""
        return -(-self.shape[self.cut] // self.parts) * prod(self.shape) // max(self.shape[self.cut], 1)

    @property
    def gathered(self) -> int:
        """Elements after a gather, padding included."""
        return self.chunk * self.parts

    def held(self, place: Place) -> int:
        """Elements here between the gathers."""
        rows = self.shape[self.cut]
        size = -(-rows // self.parts)
        here = min(size, max(rows - size * place.fsdp, 0)) if not self.expert else size
        return here * prod(self.shape) // max(rows, 1)


def shards(config: RunConfig, model: nn.Module, degrees: Degrees, place: Place) -> list[Shard]:
    """Of every parameter of `model` (as `on_meta` gives it), in its order."""
    found, precision = [], config.precision
    narrow = 2 if precision.compute == "bfloat16" else precision.parameter_dtype.itemsize
    for name, parameter in model.named_parameters():
        shape, parts = list(parameter.shape), name.split(".")
        expert = "experts" in parts
        dim = _tensor_dim(parts, name, config.model, degrees.tp)
        if expert:
            shape[0] //= degrees.ep
        elif dim is not None:
            size = -(-shape[dim] // degrees.tp)
            shape[dim] = min(size, max(shape[dim] - size * place.tp, 0))
        unit, matrices = _unit(parts)
        found.append(
            Shard(
                name=name,
                shape=tuple(shape),
                unit=unit,
                cut=1 if expert else 0,
                parts=degrees.expert_shard if expert else degrees.fsdp,
                width=narrow if matrices else precision.parameter_dtype.itemsize,
                copied=dim is None and not expert,
                expert=expert,
            )
        )
    return found


def by_unit(found: list[Shard]) -> dict[str, list[Shard]]:
    """The root's has the name ""."""
    units: dict[str, list[Shard]] = defaultdict(list)
    for shard in found:
        units[shard.unit].append(shard)
    return dict(units)


def _unit(parts: list[str]) -> tuple[str, bool]:
    """The FSDP module of a parameter, and whether it is nothing but matrices, gathered in the compute precision."""
    if parts[:2] != ["decoder", "blocks"]:
        return "", False
    block, rest = ".".join(parts[:3]), parts[3:]
    if rest[0] == "network" and rest[1] in ("experts", "shared"):
        return f"{block}.{rest[1]}", True
    if rest[0] == "network" and rest[1] in ("gate", "up", "down"):
        return f"{block}.network", True
    return block, False


def _tensor_dim(parts: list[str], name: str, model: ModelConfig, tp: int) -> int | None:
    """The dimension that tensor parallelism cuts."""
    if tp == 1:
        return None
    if name in TABLES:
        return 0
    if parts[:2] != ["decoder", "blocks"] or parts[-1] != "weight":
        return None
    owner, matrix = parts[3], parts[4]
    if owner == "attention" and matrix in ("query", "key", "value"):
        return 0 if matrix == "query" or model.kv_heads % tp == 0 else None
    if (owner, matrix) in (("attention", "output"), ("network", "down")):
        return 1
    return 0 if owner == "network" and matrix in ("gate", "up") else None
