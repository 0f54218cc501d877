"""Activation checkpointing and compilation in one process: other memory and speed, the same numbers."""

import shutil

import pytest
import torch

from mmoe.config.load import validate
from mmoe.models.decoder import ModelConfig
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.parallelize import recompute_and_compile
from tests.distributed.step import MODEL
from tests.models.random_batch import INPUTS, random_batch


def trained(**parallel) -> tuple[list[float], dict[str, torch.Tensor], list[list[int]]]:
    """Losses, summed gradients and loads of three batches."""
    model = validate(ModelConfig, MODEL, "test").build(INPUTS, 7).train()
    recompute_and_compile(model, ParallelConfig(**parallel))
    losses, loads = [], []
    for seed in range(3):
        output = model(random_batch(seed))
        loss = output.hidden.square().mean() + output.auxiliary.balance_loss
        loss.backward()
        losses.append(loss.item())
        loads.append(output.routing.load_NMSE.flatten().tolist())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loads


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_change_no_bit_and_count_nothing_twice(kind: str) -> None:
    losses, gradients, loads = trained()
    again = trained(activation_checkpointing=kind)
    assert again[0] == losses and again[2] == loads
    assert all(torch.equal(again[1][name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_keeps_fewer_bytes(kind: str) -> None:
    def kept(**parallel) -> int:
        model = validate(ModelConfig, MODEL, "test").build(INPUTS, 7).train()
        recompute_and_compile(model, ParallelConfig(**parallel))
        seen: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(random_batch(0))
        return sum(seen.values())

    assert kept(activation_checkpointing=kind) < 0.7 * kept()


@pytest.mark.slow
def test_compiled_norms_and_networks_give_the_same_up_to_rounding() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and g++ is not installed")
    losses, gradients, loads = trained()
    compiled = trained(compile=True)
    assert compiled[0] == pytest.approx(losses, rel=1e-6) and compiled[2] == loads
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[1][name], gradient, rtol=1e-4, atol=1e-6)
