"""Defines the mixture-of-experts layer: router, dispatcher and experts, with losses and statistics of its routing.

Shape suffixes as in `mmoe.models.moe.router`; L positions.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from mmoe.config.base import Config
from mmoe.models.fan_out import fan_out
from mmoe.models.layers import SwiGLU
from mmoe.models.moe.balance import balance_loss, expert_load, expert_probability, sequence_counts, z_loss
from mmoe.models.moe.dispatch import DISPATCHERS, Dispatcher, Drop, LocalDispatcher
from mmoe.models.moe.engines.engine import EXPERT_ENGINES
from mmoe.models.moe.experts import Experts
from mmoe.models.moe.noise import gaussian
from mmoe.models.moe.router import GroupLimit, GroupScore, Router, Routing, Score
from mmoe.models.moe.statistics import RoutingStatistics
from mmoe.models.moe.tokens import Tokens

MAX_WIDTH = 1 << 24  # of any dimension: beyond it a config is a slip of the pen


class MoEConfig(Config):
    """Configures the experts, their router, and which layers have them."""

    n_experts: int = Field(gt=0, le=MAX_WIDTH)  # in each layer that has experts
    top_k: int = Field(gt=0)  # experts per token
    intermediate_size: int = Field(gt=0, le=MAX_WIDTH)  # SwiGLU width of one expert
    n_shared_experts: int = Field(default=0, ge=0, le=MAX_WIDTH)  # of the same width; every token goes through them
    shared_gate: bool = False  # times the sigmoid of a product with the token (Qwen2-MoE, 2024)
    dispatcher: Annotated[str, AfterValidator(DISPATCHERS.known)] | None = None  # null: by whether there is a capacity
    capacity_factor: float | None = Field(default=None, ge=1)  # null: dropless
    # What an overfull expert drops: its lowest probabilities (`probs`), or the later tokens (`position`).
    drop_policy: Drop = "probs"
    token_group_alignment: int = Field(default=1, gt=0)  # an expert's rows, rounded up with zeros; FP8 needs 16
    # Kind of the engine that multiplies by experts.
    expert_backend: Annotated[str, AfterValidator(EXPERT_ENGINES.known)] = "grouped_mm"
    score_func: Score = "softmax"  # what makes scores of the logits; see Router
    norm_topk_prob: bool = True  # the weights of a token's experts add up to the scaling factor
    routed_scaling_factor: float = Field(default=1.0, gt=0)  # of the routed experts' weights
    n_group: int = Field(default=1, gt=0)  # the experts stand in so many groups of the same size
    topk_group: int = Field(default=1, gt=0)  # and those of a token come from so many of them
    group_score: GroupScore = "top2"  # how a token chooses its groups; see GroupLimit
    router_noise: float = Field(default=0.0, ge=0)  # standard deviation of noise on the logits, to choose in training
    bias_update_rate: float = Field(default=0.0, ge=0)  # step of the auxiliary-loss-free bias; 0: there is none
    layer_freq: int = Field(default=1, gt=0)  # layers layer_freq, 2 layer_freq, ... (from 1) have experts
    first_k_dense: int = Field(default=0, ge=0)  # but not the first ones

    @model_validator(mode="after")
    def _shape(self) -> "MoEConfig":
        if self.top_k > self.n_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are {self.n_experts} experts; lower top_k or add experts"
            )
        if self.score_func == "softmax_topk" and not self.norm_topk_prob:
            raise ValueError(
                "score_func is softmax_topk, whose weights always add up to the scaling factor, but norm_topk_prob is "
                "false; set score_func to softmax for weights that do not"
            )
        self._check_groups()
        if self.shared_gate and not self.n_shared_experts:
            raise ValueError("shared_gate is true, but there are no n_shared_experts to gate; set one of them")
        if self.drop_policy == "position" and self.capacity_factor is None:
            raise ValueError("drop_policy is position, but nothing is dropped without a capacity_factor; set one")
        by_capacity = self.dispatcher_class.by_capacity
        if by_capacity != (self.capacity_factor is not None):
            needed, remedy = ("needs a", "set one") if by_capacity else ("has no use for a", "set that to null")
            others = DISPATCHERS.kinds_that(lambda dispatcher: dispatcher.by_capacity is not by_capacity)
            raise ValueError(
                f"dispatcher is {self.dispatcher}, which {needed} capacity_factor; {remedy}, or dispatcher to {others}"
            )
        self.check_width("intermediate_size", self.intermediate_size)
        return self

    def check_width(self, key: str, width: int) -> None:
        """Raise ValueError where the engine cannot multiply matrices of this width, naming those that can."""
        if width % (multiple := EXPERT_ENGINES.find(self.expert_backend).multiple):
            others = EXPERT_ENGINES.kinds_that(lambda engine: width % engine.multiple == 0)
            raise ValueError(
                f"{key} is {width}, but model.moe.expert_backend {self.expert_backend} needs a multiple of {multiple}; "
                f"round it or set model.moe.expert_backend to {others}"
            )

    def _check_groups(self) -> None:
        if self.n_experts % self.n_group:
            raise ValueError(
                f"n_group is {self.n_group}, which does not divide the {self.n_experts} experts; change one of them"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, but n_group is {self.n_group}; lower it")
        reachable = self.topk_group * self.n_experts // self.n_group
        if self.top_k > reachable:
            raise ValueError(
                f"top_k is {self.top_k}, but the groups of a token have {reachable} experts; raise topk_group"
            )

    @property
    def group_limit(self) -> GroupLimit | None:
        """The groups that a token chooses its experts from; None where it chooses from all experts."""
        return GroupLimit(self.n_group, self.topk_group, self.group_score) if self.n_group > 1 else None

    @property
    def dispatcher_class(self) -> type[LocalDispatcher]:
        """The class of the dispatcher: the configured one, or that which a capacity factor asks for."""
        return DISPATCHERS.find(self.dispatcher or ("dropless" if self.capacity_factor is None else "capacity"))

    def in_layer(self, number: int) -> bool:
        """Return whether layer `number` (from 0) has experts."""
        return number >= self.first_k_dense and (number + 1) % self.layer_freq == 0


@dataclass(frozen=True)
class LayerRouting:
    """Holds what a forward pass routed: losses with gradient, and the statistics of training (None in evaluation).

    `balance_loss` is that of the sequences, averaged. `load_E` (i64, before any drop) and `probability_E` (means over
    the valid tokens, with gradient) are what the other levels are made of. All are returned and never kept in the
    module: what activation recomputation computes again is thrown away.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load_E: Tensor
    probability_E: Tensor
    statistics: RoutingStatistics | None

    @classmethod
    def from_routing(
        cls, routing: Routing, tokens: Tokens, load_BE: Tensor, statistics: RoutingStatistics | None
    ) -> "LayerRouting":
        """Make the losses of a routing in which the experts of each sequence have `load_BE` slots."""
        probability_BE = expert_probability(routing, tokens)
        return cls(
            balance_loss=balance_loss(load_BE, probability_BE / sequence_counts(tokens)[:, None]).mean(),
            z_loss=z_loss(routing, tokens),
            load_E=load_BE.sum(0),
            probability_E=probability_BE.sum(0) / max(len(routing.logits_TE), 1),
            statistics=statistics,
        )


class MoELayer(nn.Module):
    """Sends tokens through a router to their experts, and through those that every token goes through.

    It is the feed-forward part of the block of layer `number`.
    """

    def __init__(self, size: int, config: MoEConfig, number: int = 0) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.router = Router(
            size,
            config.n_experts,
            config.top_k,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.score_func,
            config.group_limit,
            biased=config.bias_update_rate > 0,
        )
        self.experts: nn.Module = Experts(config.n_experts, size, config.intermediate_size, config.expert_backend)
        self.shared = (
            SwiGLU(size, config.n_shared_experts * config.intermediate_size) if config.n_shared_experts else None
        )
        self.shared_gate = nn.Linear(size, 1, bias=False) if config.shared_gate else None
        self.dispatcher: Dispatcher[Any] = config.dispatcher_class.from_config(config)

    def forward(self, x_BLD: Tensor, tokens: Tokens) -> tuple[Tensor, LayerRouting]:
        """Send each token through its experts, [B, L, D] -> [B, L, D], and return also what was routed.

        Padding is not routed and gets zeros.
        """
        for_router_TD, for_experts_TD, *for_shared = fan_out(tokens.gather_valid(x_BLD), self._readers)
        routing = self.router(for_router_TD, tokens.all_gather_tokens, self._noise(tokens))
        permutation = self.dispatcher.plan(routing, tokens)
        on_their_way = self.dispatcher.dispatch(for_experts_TD, permutation)
        shared_TD = self._shared(*for_shared)  # while the rows travel
        rows_RD = self.experts(self.dispatcher.wait(on_their_way, permutation), permutation.ends_E)
        y_TD = self.dispatcher.combine(rows_RD, routing.weight_TK, permutation)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        load_BE = expert_load(routing, tokens)
        statistics = RoutingStatistics.from_routing(routing, permutation, tokens, load_BE) if self.training else None
        return tokens.scatter_valid(y_TD), LayerRouting.from_routing(routing, tokens, load_BE, statistics)

    def _noise(self, tokens: Tokens) -> Tensor | None:
        """Draw the noise [T, E] to choose with, in training: a step that seeds torch anew has noise of its own."""
        if not (self.training and self.config.router_noise):
            return None
        return self.config.router_noise * gaussian(
            tokens.key_T, self.config.n_experts, torch.initial_seed(), self.number
        )

    @property
    def _readers(self) -> int:
        """The number of readers of a token's hidden state: the router, the experts, the shared ones, their gate."""
        return 2 + (self.shared is not None) + (self.shared_gate is not None)

    def _shared(self, x_TD: Tensor | None = None, gate_TD: Tensor | None = None) -> Tensor | None:
        if self.shared is None:
            return None
        shared_TD = self.shared(x_TD)
        return shared_TD if self.shared_gate is None else shared_TD * self.shared_gate(gate_TD).sigmoid()
