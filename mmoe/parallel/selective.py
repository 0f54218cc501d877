"""Selective activation checkpointing: the products of a block are kept, what lies between them is computed again.

torch's `create_selective_checkpoint_contexts` counts every operation of the region, those of FSDP's hooks too, which
differ when a region runs again, and fails on that. Here only the products are counted.
"""

from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor

from mmoe.compat import (
    CPU_ATTENTION,
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    GROUPED_MM,
    TorchDispatchMode,
    tree_map_only,
)

# The products, which cost the most to compute again.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    GROUPED_MM.default,
    FLASH_ATTENTION.default,
    CPU_ATTENTION.default,
    EFFICIENT_ATTENTION.default,
}
Store = dict[Any, deque]  # by operation: what its calls gave, in their order


def selective_contexts() -> tuple["_Keep", "_Reuse"]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`: around a region, and around its second run."""
    store: Store = defaultdict(deque)
    return _Keep(store), _Reuse(store)


class _Keep(TorchDispatchMode):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        out = function(*arguments, **(options or {}))
        if function in KEPT:
            # Detached: autograd makes `out` itself a part of the graph that holds this store.
            self.store[function].append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function in KEPT:
            return self.store[function].popleft()
        return function(*arguments, **(options or {}))
