"""Defines dispatchers, which bring tokens to the rows of their experts, and the experts' outputs back.

A dispatcher is a plain object with `plan`, `dispatch`, `wait` and `combine`. A new one is a `LocalDispatcher`, which
plans for one process and names the exchange that spreads it over the ranks of `ep` (`mmoe.parallel.expert`). Experts
see rows sorted by expert; how many, and which of them are empty, is the dispatcher's affair. Both ways only copy rows
by index, and so do their gradients: no sum depends on the order in which threads finish.

Shape suffixes as in `mmoe.models.moe.router`: T tokens choose K of E experts each, R rows, D model width, L positions
of a sequence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mmoe.config.registry import ClassRegistry
from mmoe.models.moe.router import Routing
from mmoe.models.moe.rows import count, permute_tokens, unpermute_tokens
from mmoe.models.moe.tokens import Tokens

if TYPE_CHECKING:
    from mmoe.models.moe.layer import MoEConfig

Drop = Literal["probs", "position"]


@dataclass(frozen=True)
class TokenPermutation:
    """Says where each routed token goes: T tokens choose K experts, which makes T K slots.

    Slot t K + k is token t's k-th expert. `row_TK` is the slot's row in the buffer that is sorted by expert, R where it
    was dropped; `slot_R` is the slot in each row, T K where the row is empty. The rows of expert e end before
    `ends_E[e]` (i32). `complete`: nothing is dropped or empty.
    """

    row_TK: Tensor
    slot_R: Tensor
    ends_E: Tensor
    complete: bool

    @property
    def dropped_TK(self) -> Tensor:
        """The slots that got no row, bool."""
        return self.row_TK == len(self.slot_R)


class Placed(Protocol):
    """Says what any permutation of slots into rows can say: where groups end, what was dropped, whether all is full.

    The rows are those that experts here compute, wherever the tokens are (`TokenPermutation`).
    """

    @property
    def ends_E(self) -> Tensor:
        """The row behind the last one of each expert, i32."""

    @property
    def complete(self) -> bool:
        """True if every slot has a row and every row a slot."""

    @property
    def dropped_TK(self) -> Tensor:
        """The slots that got no row, bool."""


P = TypeVar("P", bound=Placed)
Rows = TypeVar("Rows", int, Tensor)


class Dispatcher(Protocol[P]):
    """Brings tokens to the experts that they chose, and what the experts made of them back."""

    def plan(self, routing: Routing, tokens: Tokens) -> P:
        """Give every slot a row, or drop it."""

    def dispatch(self, x_TD: Tensor, permutation: P) -> Tensor:
        """Send each row its token, [R, D]; empty rows are zero."""

    def wait(self, rows_RD: Tensor, permutation: P) -> Tensor:
        """Return what `dispatch` returned as rows [R, D] sorted by expert; waits for the rows where they travel."""

    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: P) -> Tensor:
        """Return the weighted sum over each token's slots, [T, D]; dropped ones add zero."""


class LocalDispatcher(ABC):
    """Dispatches on one process: `plan` says which slot has which row, and the rows are copied.

    A class registered in `DISPATCHERS` is a value of ``model.moe.dispatcher``. What it says of itself:

    - `by_capacity`: its rows are those of ``model.moe.capacity_factor``, which it needs; others refuse one.
    - `exchange`: its form on several ranks, a kind of `PARALLEL_DISPATCHERS` (`mmoe.parallel.expert`). A ``variable``
      one fits every plan: it reads which slots are dropped. A ``fixed`` one needs a plan that gives every expert
      equally many rows, whatever is routed, and `rows` to count them.
    """

    by_capacity: ClassVar[bool] = False
    exchange: ClassVar[str] = "variable"

    def __init__(self, experts: int, group_multiple: int = 1, capacity_factor: float | None = None) -> None:
        self.experts, self.capacity_factor = experts, capacity_factor
        self.group_multiple = group_multiple  # every expert's group has a multiple of so many rows

    @classmethod
    def from_config(cls, config: MoEConfig) -> LocalDispatcher:
        """Make the dispatcher of a layer of experts."""
        return cls(config.n_experts, config.token_group_alignment, config.capacity_factor)

    def rows(self, sequences: int, length: int, top_k: int) -> int | None:
        """Count the rows of all experts for a batch of such a shape; None where they depend on what is routed."""
        return None

    @abstractmethod
    def plan(self, routing: Routing, tokens: Tokens) -> TokenPermutation:
        """Give every slot a row, or drop it."""

    def dispatch(self, x_TD: Tensor, permutation: TokenPermutation) -> Tensor:
        """Copy each token to the rows of its slots, [R, D]; empty rows are zero."""
        row_TK, slot_R = permutation.row_TK, permutation.slot_R
        return permute_tokens(x_TD, slot_R, row_TK.flatten(), row_TK.shape[1], permutation.complete)

    def wait(self, rows_RD: Tensor, permutation: TokenPermutation) -> Tensor:
        """Return the rows as they are: here they do not travel."""
        return rows_RD

    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: TokenPermutation) -> Tensor:
        """Add up the weighted rows of each token, [T, D]."""
        return unpermute_tokens(y_RD, weight_TK, permutation.row_TK, permutation.slot_R, permutation.complete)


def by_expert(expert_TK: Tensor, experts: int, multiple: int) -> TokenPermutation:
    """Give each slot a row, sorted by expert, in it by token; groups of a multiple of `multiple` rows."""
    expert = expert_TK.flatten()
    slot = expert.argsort(stable=True)
    rank = torch.arange(len(slot), device=slot.device)
    sizes = count(expert, experts)
    row = torch.empty_like(slot)
    if multiple == 1:
        row[slot] = rank
        return TokenPermutation(row.view_as(expert_TK), slot, sizes.cumsum(0).int(), complete=True)
    rows = rounded_up(len(slot) + experts * (multiple - 1), multiple)
    padded = rounded_up(sizes, multiple)
    shift = (padded.cumsum(0) - padded) - (sizes.cumsum(0) - sizes)
    row_of_slot = rank + shift[expert[slot]]
    row[slot] = row_of_slot
    slot_in_row = slot.new_full((rows,), len(slot))
    slot_in_row[row_of_slot] = slot
    ends = padded.cumsum(0)
    ends[-1] = rows
    return TokenPermutation(row.view_as(expert_TK), slot_in_row, ends.int(), complete=False)


def rounded_up(rows: Rows, multiple: int) -> Rows:
    """Round a number, or those of a tensor, up to a multiple."""
    return -(-rows // multiple) * multiple


class DroplessDispatcher(LocalDispatcher):
    """Gives every slot a row: groups of as many rows as each expert was chosen.

    Where groups are padded, R = T K + E (group_multiple - 1), rounded up, whatever is routed, so that nobody waits
    for the sizes; the rows that no group needs are empty rows of the last one.
    """

    def plan(self, routing: Routing, tokens: Tokens) -> TokenPermutation:
        """Give every slot a row, sorted by expert."""
        return by_expert(routing.expert_TK, self.experts, self.group_multiple)


class CapacityDispatcher(LocalDispatcher):
    """Gives every expert equally many rows for each sequence, whatever is routed: fixed shapes.

    They are C = ceil(capacity_factor * L * K / E). Where more tokens of a sequence choose an expert, some are dropped:
    with `probability` those with its lowest scores (ties: the later token), with `position` the later tokens. One
    sequence never takes the rows of another.
    """

    by_capacity = True
    exchange = "fixed"
    capacity_factor: float

    def __init__(self, experts: int, capacity_factor: float, drop: Drop = "probs", group_multiple: int = 1) -> None:
        super().__init__(experts, group_multiple, capacity_factor)
        self.drop = drop

    @classmethod
    def from_config(cls, config: MoEConfig) -> CapacityDispatcher:
        """Make the dispatcher of a layer of experts, which has a capacity factor."""
        assert config.capacity_factor is not None  # MoEConfig refuses the class without one
        return cls(config.n_experts, config.capacity_factor, config.drop_policy, config.token_group_alignment)

    def capacity(self, length: int, top_k: int) -> int:
        """Count the rows of one expert for one sequence of `length` positions."""
        factor = Fraction(str(self.capacity_factor))  # as it was written: 1.1 * 90 / 3 is 33, not 34
        return math.ceil(factor * length * top_k / self.experts)

    def rows(self, sequences: int, length: int, top_k: int) -> int:
        """Count the rows of all experts: as many for each, whatever is routed."""
        return self.experts * rounded_up(sequences * self.capacity(length, top_k), self.group_multiple)

    def plan(self, routing: Routing, tokens: Tokens) -> TokenPermutation:
        """Give the slots that fit their sequence's capacity a row, and drop the others."""
        capacity, sequences = self.capacity(tokens.length, routing.expert_TK.shape[1]), tokens.sequences
        rows = self.rows(sequences, tokens.length, routing.expert_TK.shape[1])
        rows_of_expert = rows // self.experts
        group = (routing.expert_TK * sequences + tokens.sequence_T[:, None]).flatten()
        if self.drop == "position":
            slot = group.argsort(stable=True)  # by group, in it by token
        else:
            by_score = routing.score_TK.detach().flatten().argsort(descending=True, stable=True)
            slot = by_score[group[by_score].argsort(stable=True)]  # by group, in it by score, then by token
        group = group[slot]
        sizes = count(group, self.experts * sequences)
        rank = torch.arange(len(slot), device=slot.device) - (sizes.cumsum(0) - sizes)[group]
        start = group // sequences * rows_of_expert + group % sequences * capacity
        row_of_slot = torch.where(rank < capacity, start + rank, rows)
        row = torch.empty_like(slot)
        row[slot] = row_of_slot
        slot_in_row = slot.new_full((rows + 1,), len(slot))
        slot_in_row[row_of_slot] = slot
        ends = torch.arange(1, self.experts + 1, device=slot.device) * rows_of_expert
        return TokenPermutation(row.view_as(routing.expert_TK), slot_in_row[:-1], ends.int(), complete=False)


DISPATCHERS = ClassRegistry[LocalDispatcher](
    "dispatcher",
    "mmoe.dispatchers",
    LocalDispatcher,
    {
        "dropless": "mmoe.models.moe.dispatch:DroplessDispatcher",
        "capacity": "mmoe.models.moe.dispatch:CapacityDispatcher",
    },
)
