"""Defines optimizers by kind, the layout of their states, and the two of a run behind one interface."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from mmoe.config.registry import KindConfig, Registry
from mmoe.errors import ConfigError


@dataclass(frozen=True)
class StateTensor:
    """Lays out one tensor of a parameter's state, which begins as zeros.

    `shape`: None is that of the parameter, sharded as it is; a tensor of any other is whole on every rank. `dtype`:
    None is that of the parameter. `on_host`: it stays in the memory of the CPU, wherever the parameter is.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    on_host: bool = False

    def zeros(self, parameter: Tensor) -> Tensor:
        """Make the state tensor, zeros, for this parameter."""
        if self.shape is None:
            begun = torch.zeros_like(parameter, dtype=self.dtype)
        else:
            begun = torch.zeros(self.shape, dtype=self.dtype or parameter.dtype, device=parameter.device)
        return begun.cpu() if self.on_host else begun


class OptimizerConfig(KindConfig):
    """Configures an optimizer; a subclass declares its keys, builds it and lays out its state."""

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Build the optimizer over these parameters, by name.

        Its groups hold them as torch does those of (name, parameter) pairs. They may be sharded (DTensors, of several
        meshes). A `Schedule` sets every group's ``lr`` before each step.
        """
        raise NotImplementedError

    def state_layout(self, shape: tuple[int, ...]) -> dict[str, StateTensor]:
        """Lay out the state of a parameter that is of this shape when whole, by the names the optimizer has for it."""
        raise NotImplementedError


OPTIMIZERS = Registry[OptimizerConfig](
    "optimizer",
    "mmoe.optimizers",
    OptimizerConfig,
    {"adamw": "mmoe.optim.adamw:AdamWConfig", "muon": "mmoe.optim.muon:MuonConfig"},
)

ChosenOptimizer = Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(OPTIMIZERS)]


class CompositeOptimizer:
    """Runs several optimizers over disjoint parameters behind the interface of one; all groups share the schedule.

    Every parameter has its state from the start, not from its first gradient: a checkpoint is loaded into it, each
    rank its own shards, and holds the same names whatever has had a gradient so far.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers in one list."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of every parameter."""
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
        """Return the state of every parameter held here, by its fully qualified name.

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


def is_block_matrix(name: str, dimensions: int) -> bool:
    """Say whether a parameter is a matrix of a block, but not a router's."""
    return ".blocks." in name and ".router." not in name and dimensions == 2


def owner(name: str, dimensions: int, optimizer: OptimizerConfig, matrices: OptimizerConfig | None) -> OptimizerConfig:
    """Say which of a run's two optimizers updates a parameter: `matrices` those of the blocks, `optimizer` the rest."""
    return matrices if matrices is not None and is_block_matrix(name, dimensions) else optimizer


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, matrices: OptimizerConfig | None = None
) -> CompositeOptimizer:
    """Build the optimizers of all trainable parameters of `model`, shared out by `owner`.

    Raises ConfigError for an optimizer that does not hold what it was given by name.
    """
    parts = {}
    for config in (optimizer, matrices):
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and owner(name, parameter.ndim, optimizer, matrices) is config
        }
        if config is not None and parameters:
            parts[config.label] = _built(config, parameters)
    return CompositeOptimizer(parts)


def _built(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    built = config.build(parameters)
    held = {
        name: parameter
        for group in built.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"])
    }
    if {name: id(parameter) for name, parameter in held.items()} != {n: id(p) for n, p in parameters.items()}:
        raise ConfigError(
            f"optimizer {config.label} does not hold the parameters it was given by their names; have "
            f"{type(config).__name__}.build give its groups (name, parameter) pairs, of all of them"
        )
    for parameter in parameters.values():
        layout = config.state_layout(tuple(parameter.shape))
        built.state[parameter] = {name: tensor.zeros(parameter) for name, tensor in layout.items()}
    return built
