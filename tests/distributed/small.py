"""A model of a few hundred parameters whose names are those of a decoder, on one process or sharded."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mmoe.optim.adamw import AdamWConfig
from mmoe.optim.muon import MuonConfig
from mmoe.optim.optimizer import CompositeOptimizer, build_optimizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.decoder, self.head = nn.Linear(5, 6), Decoder(), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.decoder.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def mesh(*dims: int) -> DeviceMesh:
    return init_device_mesh("cpu", dims, mesh_dim_names=("dp", "tp")[: len(dims)])


def build(layout: str) -> Small:
    """The same weights in every layout: one, dp (FSDP2 over all ranks) or dp_tp (tensor parallel in pairs too)."""
    model = Small()
    if layout == "one":
        return model
    data = mesh(dist.get_world_size())
    if layout == "dp_tp":
        square = mesh(dist.get_world_size() // 2, 2)
        data = square["dp"]
        plan = {"decoder.blocks.*.up": ColwiseParallel(), "decoder.blocks.*.down": RowwiseParallel()}
        parallelize_module(model, square["tp"], plan)
    for block in model.decoder.blocks:
        fully_shard(block, mesh=data)
    return fully_shard(model, mesh=data)


def optimizer_of(model: nn.Module, muon: bool, implementation: str = "fused") -> CompositeOptimizer:
    adamw = AdamWConfig(implementation=implementation)
    optimizer = build_optimizer(model, adamw, MuonConfig() if muon else None)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    return optimizer


def train_step(model: nn.Module, optimizer: CompositeOptimizer, number: int) -> float:
    """One step on the batch of that number, the same on every rank: FSDP2's mean over ranks is then exact."""
    generator = torch.Generator().manual_seed(number)
    x, target = torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator)
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
