"""Provides AdamW (Loshchilov and Hutter 2019), which parameters it decays, and the global-norm clip."""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmoe.compat import foreach_mul_, foreach_norm
from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.optim.optimizer import OptimizerConfig, StateTensor

SCALAR_EMBEDDINGS = {"camera", "time"}  # modules that embed a camera's number and clip time

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(OptimizerConfig):
    """Configures AdamW."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: Annotated[float, Nature.ADJUSTABLE] = Field(default=0.1, ge=0)
    implementation: Literal["fused", "foreach"] = "fused"

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """Build AdamW over two groups of parameters: decayed and not."""
        chosen = {"fused": self.implementation == "fused", "foreach": self.implementation == "foreach"}
        groups = parameter_groups(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, 0.0, self.betas, self.eps, **chosen)

    def state_layout(self, shape: tuple[int, ...]) -> dict[str, StateTensor]:
        """Lay out two moments and the number of steps, which only the fused implementation has beside the parameter."""
        steps = StateTensor((), torch.float32, on_host=self.implementation != "fused")
        return {"step": steps, "exp_avg": StateTensor(), "exp_avg_sq": StateTensor()}


class ClipConfig(Config):
    """Configures the clipping of gradients by their global norm."""

    nature: ClassVar[Nature] = Nature.ADJUSTABLE

    max_norm: float | None = Field(default=1.0, gt=0)  # of all gradients together; null: measured, not clipped


def parameter_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict]:
    """Group the (name, parameter) pairs by weight decay; a group without parameters is left out.

    Not decayed: norms and biases (every parameter of one dimension or none, and all that is named ``bias``),
    and embeddings of scalars. Pulling those to zero would change what they scale or shift, not how large the
    model is. DTensors, of whatever meshes, stand apart from plain tensors: no operation takes both at once.
    """
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters.items():
        kind = (_decays(name, parameter), isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append((name, parameter))
    return [
        {"params": groups[kind], "weight_decay": weight_decay if kind[0] else 0.0}
        for kind in sorted(groups, reverse=True)
    ]


def _decays(name: str, parameter: Tensor) -> bool:
    path = name.split(".")
    return parameter.ndim > 1 and path[-1] != "bias" and SCALAR_EMBEDDINGS.isdisjoint(path)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the L2 norm of plain tensors together, f64 [], finite for all finite float32.

    Their squares and sums do not overflow there, as they do in float32 from 1.8e19 on.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(foreach_norm(gradients, 2, dtype=torch.float64)))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, config: ClipConfig) -> None:
    """Scale all gradients, whose L2 norm over all ranks is `norm` f64 [], so that it is at most `max_norm`.

    A norm at or below the bound leaves every bit as it was. A norm that is not finite makes every gradient
    NaN or zero: the caller reads it before it steps.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if config.max_norm is not None and gradients:
        # Shards of several meshes do not mix in one call; what is here of them does.
        here = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        foreach_mul_(here, (config.max_norm / norm).clamp(max=1.0).to(here[0]))
