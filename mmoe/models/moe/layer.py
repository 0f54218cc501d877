"""The mixture-of-experts layer: router, dispatcher and experts, with the losses and statistics of its routing."""

from dataclasses import dataclass

from pydantic import Field, model_validator
from torch import Tensor, nn

from mmoe.config.base import Config
from mmoe.models.layers import SwiGLU
from mmoe.models.moe.balance import balance_loss, z_loss
from mmoe.models.moe.dispatch import CapacityDispatcher, Dispatcher, DroplessDispatcher
from mmoe.models.moe.experts import GROUPED_MM_MULTIPLE, Engine, Experts
from mmoe.models.moe.router import Router
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.models.moe.tokens import Tokens


class MoEConfig(Config):
    experts: int = Field(gt=0)
    top_k: int = Field(gt=0)  # experts per token
    hidden: int = Field(gt=0)  # SwiGLU width of one expert
    shared_experts: int = Field(default=0, ge=0)  # experts of the same width that every token goes through
    capacity_factor: float | None = Field(default=None, ge=1)  # null: dropless
    engine: Engine = "grouped_mm"
    normalise: bool = True  # the weights of a token's experts add up to `scale`
    scale: float = Field(default=1.0, gt=0)
    every: int = Field(default=1, gt=0)  # layers every, 2 every, ... (counted from 1) have experts
    dense_first: int = Field(default=0, ge=0)  # but not the first ones

    @model_validator(mode="after")
    def _shape(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.experts} experts; lower top_k or add experts")
        if self.engine == "grouped_mm" and self.hidden % GROUPED_MM_MULTIPLE:
            raise ValueError(
                f"hidden is {self.hidden}, but grouped_mm needs a multiple of {GROUPED_MM_MULTIPLE}; "
                "round it or set engine to loop"
            )
        return self

    def in_layer(self, number: int) -> bool:
        """Whether layer `number` (from 0) has experts."""
        return number >= self.dense_first and (number + 1) % self.every == 0


@dataclass(frozen=True)
class LayerRouting:
    """Scalars with gradient, and the statistics of a training forward pass (None in evaluation).

    They are returned and never kept in the module: what activation recomputation computes again is thrown away.
    """

    balance_loss: Tensor
    z_loss: Tensor
    statistics: RoutingStatistics | None


class MoELayer(nn.Module):
    def __init__(self, size: int, config: MoEConfig):
        super().__init__()
        self.router = Router(size, config.experts, config.top_k, config.normalise, config.scale)
        self.experts = Experts(config.experts, size, config.hidden, config.engine)
        self.shared = SwiGLU(size, config.shared_experts * config.hidden) if config.shared_experts else None
        self.dispatcher: Dispatcher = (
            DroplessDispatcher(config.experts)
            if config.capacity_factor is None
            else CapacityDispatcher(config.experts, config.capacity_factor)
        )

    def forward(self, x_BLD: Tensor, tokens: Tokens) -> tuple[Tensor, LayerRouting]:
        """[B, L, D] -> [B, L, D] and what was routed. Padding is not routed and gets zeros."""
        x_TD = tokens.take(x_BLD)
        routing = self.router(x_TD)
        placement = self.dispatcher.plan(routing, tokens)
        rows_RD = self.experts(self.dispatcher.dispatch(x_TD, placement), placement.ends_E)
        y_TD = self.dispatcher.combine(rows_RD, routing.weight_TK, placement)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        routed = LayerRouting(
            balance_loss(routing, tokens),
            z_loss(routing, tokens),
            RoutingStatistics.of(routing, placement.dropped_TK, tokens) if self.training else None,
        )
        return tokens.put(y_TD), routed
