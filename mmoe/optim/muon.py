"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmoe.compat import adjusted_rate, orthogonalised
from mmoe.config.base import Config
from mmoe.config.nature import Nature
from mmoe.optim.adamw import AdamWConfig, build_adamw


class MuonConfig(Config):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), `torch.optim.Muon`.

    Updates are scaled to the root mean square of AdamW's (Liu et al. 2025: 0.2 sqrt(max(rows, columns))), so that
    one learning rate and one schedule serve both.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: Annotated[float, Nature.ADJUSTABLE] = Field(default=0.1, ge=0)


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` whose parameters may be sharded: the same update in every layout.

    Momentum stays sharded; the matrix to be orthogonalised is gathered and every rank orthogonalises all of it,
    because Newton-Schulz on shards would round otherwise (it runs in bfloat16), and keeps its own shard.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: `JointOptimizer` has none to give
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter]["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                direction = parameter.grad.lerp(average, momentum) if group["nesterov"] else average
                whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
                update = orthogonalised(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
                if isinstance(parameter, DTensor):  # every rank has the update: nothing is sent
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    update = update.to(parameter.device)  # an offloaded parameter is not where its mesh is
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-adjusted_rate(rate, group["adjust_lr_fn"], parameter.shape))


class JointOptimizer:
    """Several optimizers over disjoint parameters behind the interface of one; all groups share the schedule.

    Every parameter has its state from the start, not from its first gradient: a checkpoint is loaded into it, each
    rank its own shards, and holds the same names whatever has had a gradient so far.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts
        for part in parts.values():
            for group in part.param_groups:
                for parameter in group["params"]:
                    part.state[parameter] = _initial_state(part, group, parameter)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Give the groups of all optimizers in one list."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State of every parameter."""
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self) -> None:
        """Let every optimizer update its parameters."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state of every parameter held here, by its fully qualified name.

        Hyperparameters are not in it: they are the config's, and the schedule's.
        """
        states = self.state
        return {
            name: dict(states[parameter])
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"])
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in the states of the parameters held here; what `state` has beyond them is left alone."""
        for name, own in self.state_dict().items():
            for key, value in state[name].items():
                own[key].copy_(value)


def _initial_state(part: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """What torch gives a parameter at its first gradient."""
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    device = parameter.device if group["fused"] else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def is_block_matrix(name: str, dimensions: int) -> bool:
    """Say whether a parameter is one that Muon takes: a matrix of a block, but not a router's."""
    return ".blocks." in name and ".router." not in name and dimensions == 2


def build_optimizer(model: nn.Module, adamw: AdamWConfig, muon: MuonConfig | None) -> JointOptimizer:
    """AdamW over all parameters of `model`, or with `muon` over all but the two-dimensional ones of its blocks.

    Rates are zero until a `Schedule` sets each group's ``lr``.
    """
    if muon is None:
        return JointOptimizer({"adamw": build_adamw(model, adamw)})
    matrices = {
        name: parameter for name, parameter in model.named_parameters() if is_block_matrix(name, parameter.ndim)
    }
    orthogonal = ShardedMuon(
        list(matrices.items()),
        lr=0.0,
        momentum=muon.momentum,
        weight_decay=muon.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JointOptimizer({"adamw": build_adamw(model, adamw, exclude=set(matrices)), "muon": orthogonal})
