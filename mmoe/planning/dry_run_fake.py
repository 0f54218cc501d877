"""Runs code on tensors without contents, with a layout of the batch that is real nevertheless."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmoe.compat import (
    GROUPED_MM,
    ITEM,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    TorchDispatchMode,
    tree_leaves,
    unset_fake_temporarily,
)

MOST_COMPUTED = 1 << 20  # elements; larger integer tensors are masks, whose values no shape depends on
Note = Callable[[Any, tuple, Any], None]  # operation, arguments, result


class DryMode(TorchDispatchMode):
    """Computes, on top of a `FakeTensorMode`, the integers which come from no float.

    So the layout of a batch (documents, labels, places) is real, and what depends on weights has a shape alone. A
    number that the host reads from the latter is taken for 1: the flags of reports, all of which are set. The `notes`
    are told of everything that is called.
    """

    def __init__(self, *notes: Note) -> None:
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
            if function is ITEM.default:
                return 1.0 if arguments[0].dtype.is_floating_point else 1
            if function is GROUPED_MM.default:
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
    assert offs is not None  # two matrices, cut into groups
    return a.new_empty(len(offs), a.shape[0], b.shape[1])
