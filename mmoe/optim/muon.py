"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmoe.config.base import Config
from mmoe.optim.adamw import AdamWConfig, build_adamw


class MuonConfig(Config):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), `torch.optim.Muon`.

    Updates are scaled to the root mean square of AdamW's (Liu et al. 2025: 0.2 sqrt(max(rows, columns))), so that
    one learning rate and one schedule serve both.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)


class JointOptimizer:
    """Several optimizers over disjoint parameters behind the interface of one; all groups share the schedule."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State of every parameter."""
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def build_optimizer(model: nn.Module, adamw: AdamWConfig, muon: MuonConfig | None) -> JointOptimizer:
    """AdamW over all parameters of `model`, or with `muon` over all but the two-dimensional ones of its blocks.

    Rates are zero until a `Schedule` sets each group's ``lr``.
    """
    if muon is None:
        return JointOptimizer({"adamw": build_adamw(model, adamw)})
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".blocks." in name and parameter.ndim == 2 and ".router." not in name
    }
    orthogonal = torch.optim.Muon(
        list(matrices.values()),
        lr=0.0,
        momentum=muon.momentum,
        weight_decay=muon.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return JointOptimizer({"adamw": build_adamw(model, adamw, exclude=set(matrices)), "muon": orthogonal})
