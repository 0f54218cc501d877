"""One rank of a cluster that is not there: a process group that sends nothing, and tensors without contents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

MOST_COMPUTED = 1 << 20  # elements; larger integer tensors are masks, whose values no shape depends on
Note = Callable[[Any, tuple, Any], None]  # operation, arguments, result


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Be rank `rank` of `world`; every collective answers at once, as if all ranks had what this one has, or leaves
    what it should fill as it is."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # which knows groups by name, and meshes that look the same


@contextmanager
def shapes_apart() -> Iterator[None]:
    """DTensor finds a result's shape by running the operation once on whole fake tensors. Inside, that is seen by no
    mode: it is not work of this rank, and would be counted as a product and as memory of the global size."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    whole = propagator._propagate_tensor_meta_non_cached

    def unseen(operation: Any) -> Any:
        with _disable_current_modes():
            return whole(operation)

    propagator._propagate_tensor_meta_non_cached = unseen
    try:
        yield
    finally:
        del propagator._propagate_tensor_meta_non_cached


class DryMode(TorchDispatchMode):
    """On top of a `FakeTensorMode`: integers that come from no float are computed, and `notes` are told of everything.

    So the layout of a batch (documents, labels, places) is real, and what depends on weights has a shape alone. A
    number that the host reads from the latter is taken for 1: the flags of reports, all of which are set.
    """

    def __init__(self, *notes: Note):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function is torch.ops.prim.device.default:
            return function(*arguments)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on what is here first
        result = self._result(function, arguments, options or {})
        for note in self.notes:
            note(function, arguments, result)
        return result

    def _result(self, function: Any, arguments: tuple, options: dict) -> Any:
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            if function is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if arguments[0].dtype.is_floating_point else 1
            if function is torch.ops.aten._grouped_mm.default:
                return _grouped_mm(*arguments, **options)
            return function(*arguments, **options)
        if any(x.dtype.is_floating_point for x in tensors) or not _gives_small_integers(function, arguments, options):
            return function(*arguments, **options)
        with unset_fake_temporarily():
            return function(*arguments, **options)


def _gives_small_integers(function: Any, arguments: tuple, options: dict) -> bool:
    try:
        results = tree_leaves(function(*arguments, **options))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return True
    return all(x.numel() <= MOST_COMPUTED and not x.dtype.is_floating_point for x in results if isinstance(x, Tensor))


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Its shape in any precision: the kernel for tensors without contents has bfloat16 alone."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offs), a.shape[0], b.shape[1])
