"""Sums gradients where ranks hold copies, and measures those of all ranks as one vector.

Shape suffixes: N layers of experts, E experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmoe.compat import foreach_copy_, local_shape_and_offset
from mmoe.models.moe.router import Router
from mmoe.optim.adamw import gradient_norm
from mmoe.parallel.mesh import Mesh


def local(x: Tensor) -> Tensor:
    """Return the part of `x` that is on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def sum_over_tensor_ranks(model: nn.Module, mesh: Mesh) -> None:
    """Add up the gradients of what every rank of `tp` has a copy of, and used for its own positions only."""
    copies = [local(p.grad) for p in model.parameters() if p.grad is not None and _copied(p)]
    if mesh.dims.tp == 1 or not copies:
        return
    for dtype in dict.fromkeys(gradient.dtype for gradient in copies):
        chosen = [gradient for gradient in copies if gradient.dtype is dtype]
        flat = torch.cat([gradient.flatten() for gradient in chosen])
        dist.all_reduce(flat, group=mesh.group("tp"))
        foreach_copy_(chosen, [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in chosen]), chosen)])


def _copied(parameter: Tensor) -> bool:
    """Return whether the ranks of tp hold copies of the parameter."""
    assert isinstance(parameter, DTensor)  # as `parallelize` leaves all that have a gradient
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "tp" not in axes and "edp" not in axes


def total_norms(
    parameters: list[nn.Parameter],
    routers: list[Router],
    rows: list[int],
    shape: tuple[int, int],
    mesh: Mesh,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Measure the L2 norm, f64, of all gradients, and that of each expert's router weights [N, E].

    Each of the whole model's parameters is counted once. `shape` is [N, E] for the whole model, in which `rows` are
    those of the `routers` here. `parameters` are those here, without copies of another pipeline stage's. One reduction.
    """
    dims = mesh.dims
    square = torch.zeros((), dtype=torch.float64, device=device)
    for copies in (False, True):
        held = dims.dp_replicate * (dims.tp if copies else 1)  # ranks that hold the same shard
        gradients = [p.grad for p in parameters if p.grad is not None and _copied(p) is copies]
        shards = [shard for shard in map(local, gradients) if shard.numel()]
        if shards:
            square += gradient_norm(shards).to(device).square() / held
    rows_NE = torch.zeros(shape, dtype=torch.float64, device=device)
    for row, router in zip(rows, routers, strict=True):
        gradient = router.weight.grad
        if gradient is not None and local(gradient).numel():
            assert isinstance(gradient, DTensor)  # as its parameter is
            _, offset = local_shape_and_offset(gradient)
            squares = torch.linalg.vector_norm(local(gradient), dim=1, dtype=torch.float64).square()
            rows_NE[row, offset[0] : offset[0] + len(squares)] = squares / (dims.dp_replicate * dims.tp)
    sums = torch.cat([square[None], rows_NE.flatten()])
    dist.all_reduce(sums)
    norms = sums.sqrt()
    return norms[0], norms[1:].view_as(rows_NE)
