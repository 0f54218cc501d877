"""Provides Muon, an optimizer for matrices alone."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmoe.compat import adjusted_rate, orthogonalized
from mmoe.config.nature import Nature
from mmoe.errors import ConfigError
from mmoe.optim.optimizer import OptimizerConfig, StateTensor


class MuonConfig(OptimizerConfig):
    """Configures momentum orthogonalized by Newton-Schulz (Jordan et al. 2024), `torch.optim.Muon`.

    Updates are scaled to the root mean square of AdamW's (Liu et al. 2025: 0.2 sqrt(max(rows, columns))), so that
    one learning rate and one schedule serve both.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: Annotated[float, Nature.ADJUSTABLE] = Field(default=0.1, ge=0)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> "ShardedMuon":
        """Build Muon over one group of parameters. Raises ConfigError for a parameter that is no matrix."""
        if others := [name for name, parameter in parameters.items() if parameter.ndim != 2]:
            raise ConfigError(
                f"optimizer {self.label} would update {others[0]}, which is no matrix; name it in optim.matrices, and "
                "another in optim.optimizer"
            )
        return ShardedMuon(
            list(parameters.items()),
            lr=0.0,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def state_layout(self, shape: tuple[int, ...]) -> dict[str, StateTensor]:
        """Lay out the momentum."""
        return {"momentum_buffer": StateTensor()}


class ShardedMuon(torch.optim.Muon):
    """Updates as `torch.optim.Muon` does, also where parameters are sharded: the update is the same in every layout.

    Momentum stays sharded; the matrix to be orthogonalized is gathered and every rank orthogonalizes all of it,
    because Newton-Schulz on shards would round otherwise (it runs in bfloat16), and keeps its own shard.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: `CompositeOptimizer` has none to give
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter]["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                direction = parameter.grad.lerp(average, momentum) if group["nesterov"] else average
                whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
                update = orthogonalized(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
                if isinstance(parameter, DTensor):  # every rank has the update: nothing is sent
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    update = update.to(parameter.device)  # an offloaded parameter is not where its mesh is
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-adjusted_rate(rate, group["adjust_lr_fn"], parameter.shape))
