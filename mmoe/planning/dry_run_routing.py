"""Routes without a router: says where the slots of a batch go, from a stated load, as whole numbers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelConfig
from mmoe.models.moe.dispatch import LocalDispatcher
from mmoe.models.moe.layer import MoELayer
from mmoe.parallel.expert import AllToAllDispatcher
from mmoe.parallel.mesh import ParallelDims


@dataclass(frozen=True)
class Load:
    """States how the slots of a batch are spread over the ranks of an `ep` group.

    They share the slots evenly, but the rank that is looked at gets `imbalance` times the mean. Capacity keeps what
    an expert has room for.
    """

    imbalance: float = 1.0

    @classmethod
    def from_imbalance(cls, imbalance: float, model: ModelConfig, dims: ParallelDims) -> "Load":
        """Make the load of this `imbalance`; raises ConfigError where no routing has it."""
        if model.moe is not None and not 1 <= imbalance <= dims.ep:
            raise ConfigError(
                f"--imbalance is {imbalance:g}, the load of the busiest rank of ep over the mean: with parallel.ep "
                f"{dims.ep} it is between 1 and {dims.ep}; change it, or parallel.ep"
            )
        return cls(imbalance)

    def sent(self, slots: int, ranks: int, busiest: int, room: float | None) -> list[int]:
        """Return how many rows a rank with so many `slots` sends to each of the `ranks`.

        `busiest` is the number of the busiest rank. `room` is the capacity factor; None: every slot has a row.
        """
        shares = [(ranks - self.imbalance) / (ranks - 1) if ranks > 1 else 1.0] * ranks
        shares[busiest] = min(self.imbalance, ranks)
        if room is not None:
            shares = [min(share, room) for share in shares]
        return [round(share * slots / ranks) for share in shares]


class PlannedDispatcher(AllToAllDispatcher):
    """Exchanges as many rows as `load` says, where every rank has `slots`."""

    def __init__(self, local: LocalDispatcher, group: dist.ProcessGroup, load: Load, slots: int) -> None:
        super().__init__(local, group)
        self.load, self.slots = load, slots

    def _rows(self, sent_SF: Tensor) -> tuple[Tensor, list[int], list[int]]:
        dist.all_to_all_single(torch.empty_like(sent_SF), sent_SF, group=self.group)
        rank = dist.get_rank(self.group)
        sent = self.load.sent(self.slots, self.ranks, rank, self.local.capacity_factor)
        arrived_SF = torch.tensor([_even(sent[rank], sent_SF.shape[1])] * self.ranks)
        return arrived_SF, [sent[rank]] * self.ranks, sent


def plan_routing(model: nn.Module, load: Load, slots: int) -> None:
    """Set the row counts of every exchange of `model` whose sizes depend on what is routed by `load`.

    Every rank has `slots`.
    """
    for module in model.modules():
        if isinstance(module, MoELayer) and isinstance(module.dispatcher, AllToAllDispatcher):
            module.dispatcher = PlannedDispatcher(module.dispatcher.local, module.dispatcher.group, load, slots)


def _even(number: int, parts: int) -> list[int]:
    """`number` in parts that differ by 1 at most."""
    return [number // parts + (part < number % parts) for part in range(parts)]
