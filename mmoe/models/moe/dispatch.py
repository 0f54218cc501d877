"""Dispatchers: they bring tokens to the rows of their experts, and bring the experts' outputs back.

A dispatcher is a plain object with `plan`, `dispatch` and `combine`. Experts see rows sorted by expert; how
many, and which of them are empty, is the dispatcher's affair. Both ways only copy rows by index, and so do their
gradients: no sum depends on the order in which threads finish.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmoe.models.moe.router import Routing
from mmoe.models.moe.rows import copy_rows
from mmoe.models.moe.tokens import Tokens


@dataclass(frozen=True)
class Placement:
    """Where the choices of the router stand. Choice c is the (c % K)-th of token c // K.

    `row_TK` is the row of each choice, R where it was dropped; `choice_R` is the choice in each row, T K where the
    row is empty. The rows of expert e end before `ends_E[e]` (i32). `complete`: nothing is dropped or empty.
    """

    row_TK: Tensor
    choice_R: Tensor
    ends_E: Tensor
    complete: bool

    @property
    def dropped_TK(self) -> Tensor:
        return self.row_TK == len(self.choice_R)


class Dispatcher(Protocol):
    def plan(self, routing: Routing, tokens: Tokens) -> Placement:
        """Give every choice a row, or drop it."""

    def dispatch(self, x_TD: Tensor, placement: Placement) -> Tensor:
        """[R, D]: each row its token; empty rows are zero."""

    def combine(self, y_RD: Tensor, weight_TK: Tensor, placement: Placement) -> Tensor:
        """[T, D]: the weighted sum over each token's choices; dropped ones add zero."""


class LocalDispatcher:
    """Both dispatchers of one process differ in their `plan` alone."""

    def __init__(self, experts: int):
        self.experts = experts

    def dispatch(self, x_TD: Tensor, placement: Placement) -> Tensor:
        row_TK, choice_R = placement.row_TK, placement.choice_R
        return copy_rows(x_TD, choice_R, row_TK.flatten(), row_TK.shape[1], placement.complete)

    def combine(self, y_RD: Tensor, weight_TK: Tensor, placement: Placement) -> Tensor:
        row_TK, choice_R = placement.row_TK, placement.choice_R
        y_ND = copy_rows(y_RD, row_TK.flatten(), choice_R, complete=placement.complete)
        return (y_ND.unflatten(0, row_TK.shape) * weight_TK.unsqueeze(-1)).sum(1)


class DroplessDispatcher(LocalDispatcher):
    """Every choice gets a row: groups of as many rows as each expert was chosen."""

    def plan(self, routing: Routing, tokens: Tokens) -> Placement:
        expert = routing.expert_TK.flatten()
        choice = expert.argsort(stable=True)
        row = torch.empty_like(choice)
        row[choice] = torch.arange(len(choice), device=choice.device)
        ends = expert.bincount(minlength=self.experts).cumsum(0)
        return Placement(row.view_as(routing.expert_TK), choice, ends.int(), complete=True)


class CapacityDispatcher(LocalDispatcher):
    """Every expert has C = ceil(capacity_factor * L * K / E) rows for each sequence: fixed shapes, whatever is routed.

    Where more tokens of a sequence choose an expert, those with its highest scores stay (ties: the earlier
    token) and the rest are dropped. One sequence never takes the rows of another.
    """

    def __init__(self, experts: int, capacity_factor: float):
        super().__init__(experts)
        self.capacity_factor = capacity_factor

    def capacity(self, length: int, top_k: int) -> int:
        """Rows of one expert for one sequence of `length` positions."""
        return math.ceil(self.capacity_factor * length * top_k / self.experts)

    def plan(self, routing: Routing, tokens: Tokens) -> Placement:
        capacity = self.capacity(tokens.length, routing.expert_TK.shape[1])
        rows = self.experts * tokens.sequences * capacity
        group = (routing.expert_TK * tokens.sequences + tokens.sequence_T[:, None]).flatten()
        by_score = routing.score_TK.detach().flatten().argsort(descending=True, stable=True)
        choice = by_score[group[by_score].argsort(stable=True)]  # by group, in it by score, then by token
        group = group[choice]
        sizes = group.bincount(minlength=self.experts * tokens.sequences)
        rank = torch.arange(len(choice), device=choice.device) - (sizes.cumsum(0) - sizes)[group]
        row_of_choice = torch.where(rank < capacity, group * capacity + rank, rows)
        row = torch.empty_like(choice)
        row[choice] = row_of_choice
        choice_in_row = choice.new_full((rows + 1,), len(choice))
        choice_in_row[row_of_choice] = choice
        ends = torch.arange(1, self.experts + 1, device=choice.device) * tokens.sequences * capacity
        return Placement(row.view_as(routing.expert_TK), choice_in_row[:-1], ends.int(), complete=False)
