"""Computes initial values as a pure function of (seed, parameter name): no layout or order of construction matters.

Every parameter is drawn by a generator of its own, in float32, from the first of these rules that its name
matches. An expert's slice has a generator of its own too, so that a rank draws only the experts that it holds.

=========================================  ==========================================================
norms                                      ones
biases                                     zeros
last layers of time and actions            zeros: time adds nothing and actions are their mean, at first
token and camera tables, unembedding       N(0, std^2)
matrices that write the residual stream    N(0, 1 / (2 layers fan_in)): as wide as without depth
all other matrices                         N(0, 1 / fan_in): outputs as wide as their inputs
all other vectors and scalars              ones
=========================================  ==========================================================

1 / sqrt(fan_in) is the customary 0.02 at a width of 2048, and the right size at others. 1 / sqrt(2 layers) on the
residual outputs is GPT-2's (Radford et al. 2019).
"""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mmoe.hashing import seed64

ONES = ("*norm.weight",)
ZEROS = ("*.bias", "embeddings.time.output.weight", "action.output.weight")
TABLE_NAMES = ("embeddings.token.weight", "embeddings.camera.weight", "unembedding.weight")
RESIDUAL = ("decoder.*.attention.output.weight", "decoder.*.down", "decoder.*.down.weight")
EXPERTS = ("*.experts.*",)  # [experts, fan_in, fan_out]; every other matrix is [fan_out, fan_in]


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std: float, layers: int) -> None:
    """Give every parameter of `model` its initial value, in its own dtype and on its own device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, seed, std, layers))


def initial_value(
    name: str, shape: torch.Size, seed: int, std: float, layers: int, experts: range | None = None
) -> Tensor:
    """Draw the float32 value of the parameter called `name`, of the whole `shape`.

    `experts`: of experts only these.
    """
    if _matches(name, ZEROS):
        return torch.zeros(shape)
    if _matches(name, ONES) or len(shape) < 2:
        return torch.ones(shape)
    if _matches(name, EXPERTS):
        scale = _scale(name, shape[1], std, layers)
        return scale * torch.stack(
            [_normal(f"{name}.{expert}", shape[1:], seed) for expert in experts or range(shape[0])]
        )
    return _scale(name, shape[-1], std, layers) * _normal(name, shape, seed)


def is_of_experts(name: str) -> bool:
    """Return whether the first axis of the parameter is that of the experts."""
    return _matches(name, EXPERTS)


def _scale(name: str, fan_in: int, std: float, layers: int) -> float:
    if _matches(name, TABLE_NAMES):
        return std
    return (fan_in * (2 * layers if _matches(name, RESIDUAL) else 1)) ** -0.5


def _normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed64(f"{seed}/{name}"))
    return torch.randn(shape, generator=generator)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
