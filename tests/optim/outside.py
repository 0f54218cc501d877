"""An optimizer as a package outside has one: signs of a momentum, with state of shapes and types of its own."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from mmoe.optim.optimizer import OPTIMIZERS, OptimizerConfig, StateTensor


class Signs(torch.optim.Optimizer):
    """Moves every weight by the rate, against its momentum; counts its steps and columns."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], momentum: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                    state["counts"] += 1
                    parameter.add_(state["average"].sign(), alpha=-group["lr"])


@OPTIMIZERS.register("tests.signs")
class SignsConfig(OptimizerConfig):
    """Configures it."""

    kind: Literal["tests.signs"] = "tests.signs"
    momentum: float = 0.9
    named: ClassVar[bool] = True

    def build(self, parameters: Mapping[str, nn.Parameter]) -> Signs:
        return Signs(list(parameters.items() if self.named else parameters.values()), self.momentum)

    def state_layout(self, shape: tuple[int, ...]) -> dict[str, StateTensor]:
        return {"average": StateTensor(), "counts": StateTensor((2, *shape[1:]), torch.int64, on_host=True)}
