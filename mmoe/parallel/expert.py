"""Provides expert parallelism: each rank of `ep` holds E / ep experts; tokens travel to the ranks of theirs and back.

Shape suffixes as in `mmoe.models.moe`; S = ranks of `ep`, F = experts here, T tokens of which H are here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmoe.config.registry import ClassRegistry
from mmoe.models.moe.dispatch import LocalDispatcher, P, TokenPermutation, by_expert
from mmoe.models.moe.layer import MoELayer
from mmoe.models.moe.router import Routing
from mmoe.models.moe.rows import count, permute_tokens, unpermute_tokens
from mmoe.models.moe.tokens import Tokens
from mmoe.parallel.collectives import AllToAll
from mmoe.parallel.gradients import local
from mmoe.parallel.sharding_table import CUTS


class ParallelDispatcher(ABC, Generic[P]):
    """Dispatches on several ranks: `local` plans as on one process, and the rows travel within `group`.

    A class registered in `PARALLEL_DISPATCHERS` is what a `LocalDispatcher` names as its `exchange`.
    `splits_sequences`: it works where a sequence lies on several ranks, each of which sends its own tokens; where it
    does not, a ``variable`` one takes its place.
    """

    splits_sequences: ClassVar[bool] = False

    def __init__(self, local: LocalDispatcher, group: dist.ProcessGroup) -> None:
        self.local, self.group, self.ranks = local, group, dist.get_world_size(group)

    @abstractmethod
    def plan(self, routing: Routing, tokens: Tokens) -> P:
        """Give every slot a row, or drop it."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, permutation: P) -> Tensor:
        """Send each row its token, [R, D]; empty rows are zero."""

    @abstractmethod
    def wait(self, rows_RD: Tensor, permutation: P) -> Tensor:
        """Wait for the rows of the experts here, and sort them by expert."""

    @abstractmethod
    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: P) -> Tensor:
        """Bring the rows back, and add up the weighted ones of each token here; dropped slots add zero."""


PARALLEL_DISPATCHERS = ClassRegistry[ParallelDispatcher](
    "exchange",
    "mmoe.exchanges",
    ParallelDispatcher,
    {"fixed": "mmoe.parallel.expert:PaddedAllToAllDispatcher", "variable": "mmoe.parallel.expert:AllToAllDispatcher"},
)


def parallel_dispatcher_of(dispatcher: type[LocalDispatcher], split: bool) -> type[ParallelDispatcher]:
    """Find the form of a dispatcher on several ranks, and where `split`, on ranks that share sequences.

    The places that a capacity gives are shared among the ranks of a sequence as its tokens fall, so that only a
    variable exchange sends no empty rows there.
    """
    found = PARALLEL_DISPATCHERS.find(dispatcher.exchange)
    return AllToAllDispatcher if split and not found.splits_sequences else found


def shard_experts(layer: MoELayer, mesh: DeviceMesh, split: bool) -> None:
    """Leave each rank of `mesh` its experts, and let tokens travel to them; `split` as in `parallel_dispatcher_of`."""
    assert isinstance(layer.dispatcher, LocalDispatcher)  # a layer is spread once
    layer.experts = ShardedExperts(layer.experts, mesh)
    layer.dispatcher = parallel_dispatcher_of(type(layer.dispatcher), split)(layer.dispatcher, mesh.get_group())


class ShardedExperts(nn.Module):
    """Holds the experts of this rank, and computes them locally.

    The parameters have the names of `Experts` and are sharded by expert.
    """

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, parameter in experts.named_parameters():
            cut = [Shard(CUTS[f"feed_forward.experts.{name}"].dim)]
            setattr(self, name, nn.Parameter(distribute_tensor(parameter.data, mesh, cut, src_data_rank=None)))
        self._experts = [experts.to("meta")]  # in a list: its parameters are not parameters of this module

    def forward(self, x_RD: Tensor, ends_F: Tensor) -> Tensor:
        """Compute the rows sorted by the experts here, whose groups end before `ends_F`."""
        own = {name: local(parameter) for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self._experts[0], own, (x_RD, ends_F))


@dataclass(frozen=True)
class PaddedPermutation:
    """Places the slots in rows of all E experts, equally many for each, which travel whole.

    `local`: the permutation among the rows of all experts.
    """

    local: TokenPermutation
    ends_E: Tensor
    exchange: AllToAll

    @property
    def complete(self) -> bool:
        """True if every slot has a row and every row a slot."""
        return self.local.complete

    @property
    def dropped_TK(self) -> Tensor:
        """The slots that got no row, bool."""
        return self.local.dropped_TK


class PaddedAllToAllDispatcher(ParallelDispatcher[PaddedPermutation]):
    """Sends equally many rows from every rank to every other, so nobody waits for sizes."""

    def plan(self, routing: Routing, tokens: Tokens) -> PaddedPermutation:
        """Place the slots as one process does; each rank gets the rows of its experts."""
        local = self.local.plan(routing, tokens)
        here = self.local.experts // self.ranks
        # Each expert here has a group of rows from every rank, as many as an expert has in the whole local plan.
        ends = local.ends_E[:here] * self.ranks
        return PaddedPermutation(local, ends, AllToAll(None, None, self.group))

    def dispatch(self, x_TD: Tensor, permutation: PaddedPermutation) -> Tensor:
        """Send the rows of all experts to the ranks that hold them."""
        return permutation.exchange.start(self.local.dispatch(x_TD, permutation.local))

    def wait(self, rows_RD: Tensor, permutation: PaddedPermutation) -> Tensor:
        """Wait for the rows and sort them by expert."""
        permutation.exchange.wait()
        return self._swapped(rows_RD, self.ranks, len(permutation.ends_E))

    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: PaddedPermutation) -> Tensor:
        """Send the rows back and add up those of each token, [T, D]."""
        rows = self._swapped(y_RD, len(permutation.ends_E), self.ranks)
        return self.local.combine(permutation.exchange.reverse(rows), weight_TK, permutation.local)

    @staticmethod
    def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
        """Reorder rows by (outer, inner) to rows by (inner, outer)."""
        return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class AllToAllPermutation:
    """Holds the order in which the slots of the tokens here travel, and that of the rows here by expert.

    `row_HK` is the place of each slot among the `slot_R` that travel, their number where it was dropped; `arrived`
    places what arrives in rows sorted by expert. `complete` is about all tokens of the routing, `all_travel` about the
    slots of those here.
    """

    row_HK: Tensor
    slot_R: Tensor
    local_index_T: Tensor | None
    arrived: TokenPermutation
    exchange: AllToAll
    dropped_TK: Tensor
    complete: bool
    all_travel: bool

    @property
    def ends_E(self) -> Tensor:
        """The row behind the last one of each expert here, i32."""
        return self.arrived.ends_E


class AllToAllDispatcher(ParallelDispatcher[AllToAllPermutation]):
    """Sends only rows that exist: their numbers go first, and the host waits for them once a layer."""

    splits_sequences = True

    def plan(self, routing: Routing, tokens: Tokens) -> AllToAllPermutation:
        """Place the slots of the tokens here, and tell the ranks how many rows will travel."""
        local = self.local.plan(routing, tokens)
        dropped_TK, expert_HK, dropped_HK = local.dropped_TK, routing.expert_TK, local.dropped_TK
        if tokens.local_index_T is not None:
            expert_HK, dropped_HK = expert_HK[tokens.local_index_T], dropped_HK[tokens.local_index_T]
        experts = self.local.experts
        expert = torch.where(dropped_HK, experts, expert_HK).flatten()  # dropped ones are sorted behind all others
        sent_SF = count(expert, experts + 1)[:-1].view(self.ranks, -1)
        arrived_SF, received, sent = self._rows(sent_SF)
        rows = sum(sent)
        slot = expert.argsort(stable=True)
        row = torch.empty_like(slot)
        row[slot] = torch.arange(len(slot), device=slot.device).clamp(max=rows)
        return AllToAllPermutation(
            row_HK=row.view_as(expert_HK),
            slot_R=slot[:rows],
            local_index_T=tokens.local_index_T,
            arrived=self._arrived(arrived_SF, sum(received)),
            exchange=AllToAll(received, sent, self.group),
            dropped_TK=dropped_TK,
            complete=local.complete,
            all_travel=rows == len(slot),
        )

    def _rows(self, sent_SF: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return the rows that come from each rank for each expert here, and the rows of each rank: received, sent."""
        arrived_SF = torch.empty_like(sent_SF)
        dist.all_to_all_single(arrived_SF, sent_SF, group=self.group)
        received, sent = torch.stack([arrived_SF.sum(1), sent_SF.sum(1)]).tolist()
        return arrived_SF, received, sent

    def _arrived(self, arrived_SF: Tensor, rows: int) -> TokenPermutation:
        """Sort the rows by expert; they arrive by rank, then by expert."""
        here = arrived_SF.shape[1]
        expert_SF = torch.arange(here, device=arrived_SF.device).repeat(self.ranks)
        expert_R1 = expert_SF.repeat_interleave(arrived_SF.flatten(), output_size=rows)[:, None]
        return by_expert(expert_R1, here, self.local.group_multiple)

    def dispatch(self, x_HD: Tensor, permutation: AllToAllPermutation) -> Tensor:
        """Send the rows of the slots to the ranks that hold their experts."""
        row_HK = permutation.row_HK
        rows = permute_tokens(x_HD, permutation.slot_R, row_HK.flatten(), row_HK.shape[1], permutation.all_travel)
        return permutation.exchange.start(rows)

    def wait(self, rows_RD: Tensor, permutation: AllToAllPermutation) -> Tensor:
        """Wait for the rows and sort them by expert."""
        permutation.exchange.wait()
        arrived = permutation.arrived
        return permute_tokens(rows_RD, arrived.slot_R, arrived.row_TK.flatten(), complete=arrived.complete)

    def combine(self, y_RD: Tensor, weight_TK: Tensor, permutation: AllToAllPermutation) -> Tensor:
        """Send the rows back and add up those of each token here, [H, D]."""
        arrived = permutation.arrived
        rows = permute_tokens(y_RD, arrived.row_TK.flatten(), arrived.slot_R, complete=arrived.complete)
        weight_HK = weight_TK if permutation.local_index_T is None else weight_TK[permutation.local_index_T]
        back = permutation.exchange.reverse(rows)
        return unpermute_tokens(back, weight_HK, permutation.row_HK, permutation.slot_R, permutation.all_travel)
