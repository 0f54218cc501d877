"""Provides selective activation checkpointing: a block's products are kept, what lies between them is computed again.

torch's `create_selective_checkpoint_contexts` counts every operation of the region, those of FSDP's hooks too, which
differ when a region runs again, and fails on that. Here only the products are counted.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from mmoe.compat import TorchDispatchMode, tree_map_only

# Kept in every block, beside what its attention backend and expert engine say of themselves (`saved_ops`).
PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
Store = dict[Any, deque]  # by operation that is kept: what its calls gave, in their order


def selective_contexts(saved_ops: frozenset[Any]) -> tuple["_Keep", "_Reuse"]:
    """Make the `context_fn` of `torch.utils.checkpoint.checkpoint`: around a region, and around its second run.

    The results of `saved_ops` are kept beside plain matrix products.
    """
    store: Store = {operation: deque() for operation in PRODUCTS | saved_ops}
    return _Keep(store), _Reuse(store)


class _Keep(TorchDispatchMode):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        out = function(*arguments, **(options or {}))
        if function in self.store:
            # Detached: autograd makes `out` itself a part of the graph that holds this store.
            self.store[function].append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function in self.store:
            return self.store[function].popleft()
        return function(*arguments, **(options or {}))
