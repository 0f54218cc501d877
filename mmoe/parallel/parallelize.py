"""Spreads a model over a mesh, in the order in which the steps build on one another."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from mmoe.errors import ConfigError
from mmoe.models.attention.backend import ATTENTION_BACKENDS
from mmoe.models.decoder import Block, ModelConfig, MultimodalModel
from mmoe.models.layers import RMSNorm, SwiGLU
from mmoe.models.moe.engines.engine import EXPERT_ENGINES
from mmoe.models.moe.layer import MoELayer
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.expert import shard_experts
from mmoe.parallel.mesh import Mesh, ParallelDims
from mmoe.parallel.selective import selective_contexts
from mmoe.parallel.sharding_table import unit_of
from mmoe.parallel.tensor import check_tensor, shard_tensors
from mmoe.precision.config import PrecisionConfig


def parallelize(model: MultimodalModel, mesh: Mesh, config: ParallelConfig, precision: PrecisionConfig) -> None:
    """Spread `model`, or a pipeline stage of it, in place: tensor, expert, checkpointing, compilation, FSDP2.

    Context parallelism changes no module: it is in the `BatchContext` that the model is called with. Gradients add up
    over the ranks and are never averaged: every loss is divided by the planned count of the whole step already.
    """
    dims, blocks = mesh.dims, [block for block in model.decoder.blocks if isinstance(block, Block)]
    if dims.tp > 1:
        shard_tensors(model, mesh.axis("tp"))
    for block in blocks:
        if isinstance(block.feed_forward, MoELayer) and (dims.ep > 1 or dims.sequence_ranks > 1):
            shard_experts(block.feed_forward, mesh.axis("ep"), dims.sequence_ranks > 1)
    recompute_and_compile(model, config)
    _shard(model, mesh, config, precision)


def recompute_and_compile(model: MultimodalModel, config: ParallelConfig) -> None:
    """Apply what needs no other rank, checkpointing and compilation, block by block; names of parameters stay."""
    blocks: list[nn.Module] = [block for block in model.decoder.blocks if isinstance(block, Block)]
    contexts = partial(selective_contexts, _saved_ops(model.decoder.config))
    for block in blocks:
        if config.activation_checkpointing != "none":
            again = {"context_fn": contexts} if config.activation_checkpointing == "selective" else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **again)
        if config.compile:
            # Attention goes from document to document and experts from group to group: graphs of these would be
            # made anew for every batch (docs/decisions.md).
            for module in block.modules():
                if isinstance(module, RMSNorm | SwiGLU):
                    module.compile()


def _saved_ops(config: ModelConfig) -> frozenset[Any]:
    """Collect the operations whose results selective recomputation keeps, as the parts of a block say."""
    of_experts = EXPERT_ENGINES.find(config.moe.expert_backend).saved_ops if config.moe is not None else frozenset()
    return config.attention_class.saved_ops | of_experts


def check_layout(config: ModelConfig, dims: ParallelDims) -> None:
    """Raise ConfigError where the model cannot be spread over these degrees."""
    if dims.cp > 1 and not config.attention_class.supports_cp:
        others = ATTENTION_BACKENDS.kinds_that(lambda backend: backend.supports_cp)
        raise ConfigError(
            f"parallel.cp is {dims.cp}, but model.attention is {config.attention}, which has no form for positions "
            f"of several ranks; set it to {others}, or parallel.cp to 1"
        )
    if dims.tp > 1:
        check_tensor(config, dims.tp)
    if config.moe is None:
        if dims.ep > 1:
            raise ConfigError(f"parallel.ep is {dims.ep}, but the model has no experts; set it to 1")
        return
    if config.moe.n_experts % dims.ep:
        raise ConfigError(
            f"parallel.ep is {dims.ep}, which does not divide the {config.moe.n_experts} experts of model.moe; "
            "lower it to a divisor"
        )
    for name, width in (
        ("model.d_model", config.d_model),
        ("model.moe.intermediate_size", config.moe.intermediate_size),
    ):
        if width % dims.edp:
            raise ConfigError(
                f"{name} is {width}, which the {dims.edp} ranks that share an expert (dp_shard x cp x tp / "
                "ep) do not divide; raise parallel.ep, or use dp_replicate for some of dp_shard"
            )


def _shard(model: MultimodalModel, mesh: Mesh, config: ParallelConfig, precision: PrecisionConfig) -> None:
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.offload else OffloadPolicy()
    shard = partial(fully_shard, offload_policy=offload, reshard_after_forward=config.zero == 3)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Modules that are nothing but matrices are gathered in the precision of the products, which autocast would round
    # them to anyway; norms, routers and tables stay as they are.
    matrices = whole
    if precision.compute == "bfloat16":
        matrices = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    axes = {"fsdp": mesh.fsdp, "edp": mesh.edp_fsdp}
    units = dict.fromkeys(unit_of(name) for name, _ in model.named_parameters())
    for unit in sorted(units, key=lambda unit: -len(unit.path.split("."))):  # blocks after what is in them
        if unit.path:
            placed = partial(_placed, unit.dim)
            policy = matrices if unit.matrices else whole
            shard(model.get_submodule(unit.path), mesh=axes[unit.axis], mp_policy=policy, shard_placement_fn=placed)
    # The rest is used by the losses too, after the forward pass: it stays gathered.
    fully_shard(model, mesh=mesh.fsdp, mp_policy=whole, offload_policy=offload, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reduce_by_sum(module)


def _placed(dim: int, parameter: nn.Parameter) -> Shard:
    return Shard(dim)


def reduce_by_sum(module: FSDPModule) -> None:
    """Reduce gradients by plain sums: gloo has no scaled ones, and a mean would divide a second time."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def accumulate(model: nn.Module, config: ParallelConfig, last: bool) -> None:
    """Prepare a backward pass: with ZeRO-1, gradients are reduced and weights given back only in the step's `last`."""
    if config.zero == 1:
        assert isinstance(model, FSDPModule)  # where there are ranks to wait for
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
