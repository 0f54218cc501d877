"""Counts the collectives of what runs inside, by axis of the mesh, in a real run and in a dry one."""

from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmoe.compat import C10D, FUNCTIONAL, TorchDispatchMode, group_of_collective, tree_leaves
from mmoe.parallel.mesh import Mesh
from mmoe.planning.communication_traffic import TRAFFIC_AXES, Traffic, traffic_axis

# By operation: the name of the collective, and which argument (or "result") is the whole tensor that it is about.
COLLECTIVES: dict[Any, tuple[str, int | str]] = {
    C10D._allgather_base_.default: ("all_gather", 0),
    C10D.allgather_.default: ("all_gather", 0),
    C10D._reduce_scatter_base_.default: ("reduce_scatter", 1),
    C10D.reduce_scatter_.default: ("reduce_scatter", 1),
    C10D.allreduce_.default: ("all_reduce", 0),
    C10D.alltoall_base_.default: ("all_to_all", 1),
    C10D.alltoall_.default: ("all_to_all", 1),
    C10D.broadcast_.default: ("broadcast", 0),
    C10D.send.default: ("send", 0),
    C10D.recv_.default: ("receive", 0),
    FUNCTIONAL.all_gather_into_tensor.default: ("all_gather", "result"),
    FUNCTIONAL.reduce_scatter_tensor.default: ("reduce_scatter", 0),
    FUNCTIONAL.all_reduce.default: ("all_reduce", 0),
    FUNCTIONAL.all_reduce_.default: ("all_reduce", 0),
    FUNCTIONAL.all_to_all_single.default: ("all_to_all", 0),
    FUNCTIONAL.broadcast.default: ("broadcast", 0),
}


class CommunicationTrace(TorchDispatchMode):
    """Counts the collectives that this rank takes part in while the context lasts, as `traffic` so far.

    Raises KeyError for a collective that it does not know.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.traffic, self._degrees = Traffic(), mesh.dims
        self._axis = {mesh.group(axis).group_name: axis for axis in TRAFFIC_AXES if axis not in ("peers", "all")}
        if mesh.dims.dp_replicate > 1:
            for device_mesh in (mesh.fsdp, mesh.edp_fsdp):
                self._axis[device_mesh.get_group("dp_replicate").group_name] = "dp_replicate"
        self._axis[mesh.peers.group_name] = "peers"
        everyone = dist.group.WORLD
        assert everyone is not None  # a mesh has a default group
        self._axis[everyone.group_name] = "all"

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on what is here first
        result = function(*arguments, **(options or {}))
        self.note(function, arguments, result)
        return result

    def note(self, function: Any, arguments: tuple, result: Any) -> None:
        """Count a call of `function`, if it is a collective among several ranks."""
        group = group_of_collective(function, arguments)
        if group is not None and group.size() > 1:
            collective, whole = COLLECTIVES[function]
            value = result if isinstance(whole, str) else arguments[whole]
            axis = traffic_axis(self._degrees, self._axis[group.group_name], collective)
            self.traffic.add(axis, collective, _bytes(value))

    def take(self) -> Traffic:
        """Return the traffic since the last call of this."""
        taken, self.traffic = self.traffic, Traffic()
        return taken


def _bytes(value: Any) -> int:
    return sum(prod(x.shape) * x.dtype.itemsize for x in tree_leaves(value) if isinstance(x, Tensor))
