"""One update in every layout, and one optimizer over tensors of several meshes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmoe.config.load import validate
from mmoe.optim.config import OptimConfig
from mmoe.optim.optimizer import build_optimizer
from tests.distributed.pool import Pool
from tests.distributed.small import build, full, mesh, optimizer_of, train_step
from tests.optim import outside  # noqa: F401  # registers the kind tests.signs


def give_gradients(model: nn.Module, number: int) -> None:
    """The same gradients in every layout."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = gradient


def difference(model: nn.Module, plain: nn.Module) -> float:
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max((full(a) - b).abs().max().item() for a, b in pairs)


def muon_trained() -> float:
    plain, sharded = build("one"), build("dp")
    for model in (plain, sharded):
        optimizer = optimizer_of(model, muon=True)
        for number in range(3):
            train_step(model, optimizer, number)
    return difference(sharded, plain)


def test_muon_under_fsdp_is_muon_in_one_process(two: Pool) -> None:
    assert max(two.run(muon_trained)) <= 1e-6


def outside_trained() -> float:
    plain, sharded = build("one"), build("dp")
    chosen = validate(
        OptimConfig,
        {"lr": {"peak": 1}, "optimizer": {"kind": "tests.signs"}, "matrices": {"kind": "tests.signs", "name": "other"}},
        "test",
    )
    for model in (plain, sharded):
        optimizer = build_optimizer(model, chosen.optimizer, chosen.matrices)
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        for number in range(3):
            give_gradients(model, number)
            optimizer.step()
    return difference(sharded, plain)


def test_an_optimizer_from_outside_the_package_holds_sharded_parameters(two: Pool) -> None:
    assert max(two.run(outside_trained)) <= 1e-6


def muon_fed() -> float:
    """Rows sharded twice (tensor parallel, then FSDP2) and columns too; momentum is placed as its parameter."""
    plain, sharded = build("one"), build("dp_tp")
    for model in (plain, sharded):
        optimizer = optimizer_of(model, muon=True)
        for number in range(3):
            give_gradients(model, number)
            optimizer.step()
    matrices = optimizer.parts["muon"].param_groups[0]["params"]
    for parameter in matrices:
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.placements == parameter.placements and momentum.to_local().numel() == momentum.numel() // 4
    return difference(sharded, plain)


def test_muon_of_matrices_sharded_on_two_axes_is_muon_in_one_process(four: Pool) -> None:
    assert max(four.run(muon_fed)) <= 1e-6


class Mixed(nn.Module):
    """Parameters of three meshes, and one that is not sharded at all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (7, 6), "norm": (6,), "up": (8, 6), "experts": (4, 5, 6), "gain": (5,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def shard(self) -> "Mixed":
        flat, square = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), mesh(2, 2)

        def place(name: str, on, *placements) -> None:
            tensor: Tensor = self.get_parameter(name).detach()
            self.register_parameter(name, nn.Parameter(distribute_tensor(tensor, on, placements, src_data_rank=None)))

        place("matrix", square, Replicate(), Shard(0))
        place("norm", square["dp"], Shard(0))
        place("up", square, Shard(0), Shard(1))
        place("experts", flat, Shard(0))
        return self


def adamw_fed(implementation: str) -> float:
    plain = Mixed()
    sharded = copy.deepcopy(plain).shard()
    for model in (plain, sharded):
        optimizer = optimizer_of(model, muon=False, implementation=implementation)
        for number in range(3):
            give_gradients(model, number)
            optimizer.step()
    assert all(
        state["exp_avg"].placements == p.placements for p, state in optimizer.state.items() if isinstance(p, DTensor)
    )
    return difference(sharded, plain)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_one_adamw_holds_tensors_of_several_meshes(four: Pool, implementation: str) -> None:
    assert max(four.run(adamw_fed, implementation)) <= 1e-6
