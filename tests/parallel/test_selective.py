"""Products are computed once, all else twice."""

from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmoe.parallel.selective import selective_contexts


def test_selective_checkpointing_computes_no_product_twice_and_all_else() -> None:
    calls: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments, **(options or {}))

    def region(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(x @ weight) @ weight)

    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for options in ({}, {"context_fn": partial(selective_contexts, frozenset())}):
        with Count():
            out = checkpoint(region, x, use_reentrant=False, **options)
            out.sum().backward()
        gradients.append((x.grad.numpy().copy(), weight.grad.numpy().copy(), dict(calls)))
        x.grad = weight.grad = None
        calls.clear()
    (full_x, full_weight, full), (selective_x, selective_weight, selective) = gradients
    assert np.array_equal(full_x, selective_x) and np.array_equal(full_weight, selective_weight)
    assert (full["mm"], selective["mm"]) == (2 + 2 + 4, 2 + 4)  # forward, again, and two a product backward
    assert full["sin"] == selective["sin"] == 2
