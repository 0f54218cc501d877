"""Defines the interface of an expert engine, and the registry of engines.

Shape suffixes: R rows sorted by expert, E experts, D model width, F hidden width; `ends_E` (i32) are the rows
before which each expert's group ends, the last one R.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.config.registry import ClassRegistry
from mmoe.errors import ConfigError

KEY = "model.moe.expert_backend"


class ExpertEngine(ABC):
    """Computes the experts of one layer, and says what it can do.

    A class registered in `EXPERT_ENGINES` is a value of ``model.moe.expert_backend``. What it says of itself:

    - `requires`: names of `mmoe.optional` (packages, ``cuda``), without which a run is refused at its start.
    - `multiple`: the widths D and F must be multiples of it.
    - `dtypes`: those that it multiplies in; None for any.
    - `saved_ops`: the operations whose results selective recomputation keeps, beside plain matrix products.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    multiple: ClassVar[int] = 1
    dtypes: ClassVar[frozenset[torch.dtype] | None] = None
    saved_ops: ClassVar[frozenset[Any]] = frozenset()

    def __init__(self, experts: int, size: int, hidden: int) -> None:
        self.experts, self.size, self.hidden = experts, size, hidden

    @abstractmethod
    def swiglu(self, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute down(silu(gate(x)) * up(x)) of each group of rows with the weights of its expert, [R, D] -> [R, D].

        `x_RD` and all weights are of one dtype.
        """

    @classmethod
    def multiplies(cls, dtype: torch.dtype) -> bool:
        """Return whether the engine has products of this dtype."""
        return cls.dtypes is None or dtype in cls.dtypes


class ProductEngine(ExpertEngine):
    """Computes the experts by one grouped product, called for each of the three."""

    @abstractmethod
    def multiply(self, x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each group of rows with the weight of its expert, [R, D] -> [R, F]."""

    def swiglu(self, x_RD: Tensor, gate_EDF: Tensor, up_EDF: Tensor, down_EFD: Tensor, ends_E: Tensor) -> Tensor:
        """Compute the experts by three grouped products, [R, D] -> [R, D]."""
        hidden_RF = F.silu(self.multiply(x_RD, gate_EDF, ends_E)) * self.multiply(x_RD, up_EDF, ends_E)
        return self.multiply(hidden_RF, down_EFD, ends_E)


EXPERT_ENGINES = ClassRegistry[ExpertEngine](
    "expert engine",
    "mmoe.expert_engines",
    ExpertEngine,
    {
        "grouped_mm": "mmoe.models.moe.engines.grouped_mm:GroupedMMEngine",
        "loop": "mmoe.models.moe.engines.loop:LoopEngine",
        "megablocks": "mmoe.models.moe.engines.megablocks:MegaBlocksEngine",
        "transformer_engine": "mmoe.models.moe.engines.transformer_engine:TransformerEngineEngine",
    },
)


def check_dtype(kind: str, dtype: torch.dtype) -> None:
    """Raise ConfigError where the engine has no products of this dtype, naming those that have."""
    found = EXPERT_ENGINES.find(kind)
    if not found.multiplies(dtype):
        others = EXPERT_ENGINES.kinds_that(lambda engine: engine.multiplies(dtype))
        raise ConfigError(
            f"{KEY} is {kind}, which has no {str(dtype).removeprefix('torch.')} kernel; set it to {others}, or change "
            "precision.compute"
        )


def sizes_of(ends_E: Tensor) -> list[int]:
    """Return the number of rows of each expert's group, on the host."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
