"""Gathers the private names of torch that this package uses: what each is for, and which public one may replace it.

torch may rename or drop them without notice: then this is the file to mend. Processes that only load data import it
too, so what `import torch` has not loaded already (torch.distributed.tensor takes a second) is imported in functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

# Tensors without contents, to run a step dry. Public: none yet.
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

# Sees every operation that runs. Public: none yet.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

# The tensors within nested arguments. Public: none yet.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker as FSDPMemTracker
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# Operators, as a `TorchDispatchMode` sees them. Public: the functions that call them (`F.grouped_mm`,
# `F.scaled_dot_product_attention`, `Tensor.item`), none for the operators.
GROUPED_MM = torch.ops.aten._grouped_mm
FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
EFFICIENT_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ITEM = torch.ops.aten._local_scalar_dense
C10D, FUNCTIONAL = torch.ops.c10d, torch.ops._c10d_functional

# The collectives on one tensor, and the timeout of a group. Public: since torch 2.14, under the names asked for first.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
set_group_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

# On a list of tensors in one kernel: add to them, copy to them, scale them, their norms. Public: none yet.
foreach_add_, foreach_copy_, foreach_mul_ = torch._foreach_add_, torch._foreach_copy_, torch._foreach_mul_
foreach_norm = torch._foreach_norm

# What Muon does to a matrix, and to its rate. Public: `torch.optim.Muon`, once it takes sharded parameters.
orthogonalized, adjusted_rate = _zeropower_via_newtonschulz, _adjust_lr


def default_store() -> dist.Store:
    """Return the store through which the processes of the default group found each other. Public: none yet."""
    return dist.distributed_c10d._get_default_store()


def process_groups() -> list[dist.ProcessGroup]:
    """Return all groups of this process, the default one among them. Public: none yet."""
    return list(dist.distributed_c10d._world.pg_map)


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """Return how long a collective on CPU tensors may take in the group. Public: none yet."""
    return group._get_backend(torch.device("cpu")).options._timeout


def flight_records() -> list[str]:
    """Return torch's flight recorders as JSON, gloo's and NCCL's: this process's last collectives. Public: none yet."""
    gloo = c10d._dump_fr_trace_json()  # type: ignore[attr-defined]  # missing in torch's stubs
    return [gloo, c10d._dump_nccl_trace_json()] if torch.cuda.is_available() else [gloo]  # type: ignore[attr-defined]


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Join the axes of `mesh` into one that has a group of its own. Public: none yet."""
    return mesh._flatten(name)


def local_shape_and_offset(x: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the part of `x` that is here, and where it begins in the whole. Public: none yet."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)


def storage_info(path: str, offset: int, length: int) -> Any:
    """Give the place of a tensor's bytes, in the file `path` of a checkpoint's folder. Public: none yet."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(path, offset, length)


def group_of_collective(operation: Any, arguments: tuple) -> dist.ProcessGroup | None:
    """Return the group that an operation sends in; None for one that sends nothing. Public: none yet."""
    from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops

    if operation not in collective_ops or operation in sync_ops:
        return None
    return CollectiveOp.get_process_group(operation, arguments)


def memory_tracker(model: torch.nn.Module) -> FSDPMemTracker:
    """Follows the memory of a step of FSDP2, by kind. Public: none yet."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    return FSDPMemTracker(model)


def pad_shards(module: FSDPModule) -> None:
    """Move the uneven shards of a module to padded memory now, not in its first forward pass. Public: none yet."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is not None:  # the root of a middle pipeline stage has no parameters of its own
        group.lazy_init()


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Be rank `rank` of `world`; every collective answers at once, as if all ranks had what this one has, or leaves
    what it should fill as it is. Public: none yet."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # which knows groups by name, and meshes that look the same


@contextmanager
def shapes_apart() -> Iterator[None]:
    """Hide from all modes how DTensor finds a result's shape, as long as the context lasts. Public: none yet.

    It runs the operation once on whole fake tensors. That is not work of this rank, and would be counted as a product
    and as memory of the global size.
    """
    from torch.distributed.tensor import DTensor

    propagator = DTensor._op_dispatcher.sharding_propagator
    whole = propagator._propagate_tensor_meta_non_cached

    def unseen(operation: Any) -> Any:
        with _disable_current_modes():
            return whole(operation)

    # Of this one object, where mypy sees a method of its class.
    propagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del propagator._propagate_tensor_meta_non_cached
