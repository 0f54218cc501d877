"""Provides tensor and sequence parallelism: attention and FFN by head and column, the vocabulary by id.

Between their matrices a rank holds the positions of `mmoe.parallel.sequence`; what enters attention or an FFN is
gathered, what leaves is summed and split again. What is not a matrix of these, and every expert, is the same on all
ranks of `tp`, and works on the positions that are here. Shape suffixes: B sequences, H positions here, D model width,
n chosen positions, V ids.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from mmoe.errors import ConfigError
from mmoe.models.attention.module import Attention
from mmoe.models.decoder import Block, ModelConfig, MultimodalModel
from mmoe.models.embeddings import TokenTable
from mmoe.models.layers import SwiGLU
from mmoe.parallel.collectives import all_gather_no_grad, reduce_scatter_gather_grad
from mmoe.parallel.gradients import local
from mmoe.parallel.sharding_table import CUTS, cut_of
from mmoe.precision.upcast import upcast


def check_tensor(config: ModelConfig, tp: int) -> None:
    """Raise ConfigError where `tp` ranks cannot share the matrices of the model."""
    remedy = "change it, or parallel.tp"
    if config.n_heads % tp:
        raise ConfigError(f"model.n_heads is {config.n_heads}, not a multiple of parallel.tp {tp}; {remedy}")
    if config.n_kv_heads % tp and tp % config.n_kv_heads:
        raise ConfigError(
            f"model.n_kv_heads is {config.n_kv_heads}, neither a multiple nor a divisor of parallel.tp {tp}; {remedy}"
        )
    if config.intermediate_size % tp:
        raise ConfigError(
            f"model.intermediate_size is {config.intermediate_size}, not a multiple of parallel.tp {tp}; {remedy}"
        )


def check_vocabulary(size: int, tp: int, fsdp: int) -> None:
    """Raise ConfigError where the table of `size` ids cannot be cut by `tp` and then by `fsdp`.

    FSDP2 cuts each of tp's unequal parts by itself; DTensor, which loads and saves them, expects other borders then.
    """
    if tp > 1 and fsdp > 2 and size % tp:
        raise ConfigError(
            f"the vocabulary has {size:,} ids, not a multiple of parallel.tp {tp}, and more than two ranks of "
            f"dp_shard x cp ({fsdp}) share each part; take a text tokenizer with {-size % tp} more ids, another "
            "parallel.tp, or parallel.dp_replicate for dp_shard"
        )


def shard_tensors(model: MultimodalModel, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism over `mesh` to the parts of the model that are here."""
    for block in model.decoder.blocks:
        if isinstance(block, Block):
            _shard_attention(block.attention, mesh)
            if isinstance(block.feed_forward, SwiGLU):
                _shard_feed_forward(block.feed_forward, mesh)
    if model.embeddings is not None:
        model.embeddings.token = VocabularyEmbedding(model.embeddings.token, mesh)
    if model.unembedding is not None:
        model.unembedding.weight = _cut_table("unembedding.weight", model.unembedding.weight, mesh)


def _cut_table(name: str, weight: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(CUTS[name].dim)], src_data_rank=None))


def _shard_attention(attention: Attention, mesh: DeviceMesh) -> None:
    kv_heads = attention.key.out_features // attention.head_dim
    whole = (Shard(1), None, None), (Replicate(), None, None)
    styles: dict[int | None, ParallelStyle] = {
        0: ColwiseParallel(),
        1: RowwiseParallel(output_layouts=Shard(1)),
        None: RepeatedHeads(attention.head_dim, mesh.size() // kv_heads),
    }
    plan = {}
    for name in ("query", "key", "value", "output"):
        cut = cut_of(f"attention.{name}.weight", kv_heads, mesh.size())
        plan[name] = styles[cut.dim if cut else None]
    parallelize_module(
        attention, mesh, {"": PrepareModuleInput(input_layouts=whole[0], desired_input_layouts=whole[1])}
    )
    parallelize_module(attention, mesh, plan)


def _shard_feed_forward(feed_forward: SwiGLU, mesh: DeviceMesh) -> None:
    styles: dict[int, ParallelStyle] = {0: ColwiseParallel(), 1: RowwiseParallel(output_layouts=Partial())}
    plan = {name: styles[CUTS[f"feed_forward.{name}.weight"].dim] for name in ("gate", "up", "down")}
    entry = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    parallelize_module(feed_forward, mesh, {"": entry, **plan})

    def leave(_: nn.Module, __: tuple, part_BMD: Tensor) -> Tensor:
        # RowwiseParallel could sum and split too, but returns a view, which FSDP warns of.
        return reduce_scatter_gather_grad(part_BMD.unflatten(1, (mesh.size(), -1)).transpose(0, 1), mesh.get_group())

    feed_forward.register_forward_hook(leave)


class RepeatedHeads(ParallelStyle):
    """Projects to keys or values of fewer heads than ranks: each computes all heads and keeps the one it needs."""

    def __init__(self, head_dim: int, repeated: int) -> None:
        super().__init__()
        self.head_dim, self.repeated = head_dim, repeated

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        first = mesh.get_local_rank() // self.repeated * self.head_dim

        def enter(_: nn.Module, inputs: tuple) -> tuple:
            # Each rank differentiates its own head only: the gradients of the input add up.
            return (inputs[0].to_local(grad_placements=[Partial()]), *inputs[1:])

        def leave(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            return output[..., first : first + self.head_dim]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class VocabularyEmbedding(nn.Module):
    """Holds the token table, a range of ids on each rank of `tp`: [B, H] ids of this rank -> [B, H, D]."""

    def __init__(self, table: TokenTable, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = _cut_table("embeddings.token.weight", table.weight, mesh)
        self.mesh = mesh

    def forward(self, ids_BH: Tensor) -> Tensor:
        """Look up the vectors [B, H, D] of the ids [B, H], each on the rank that has it."""
        weight, group = local(self.weight), self.mesh.get_group()
        ids_nBH = all_gather_no_grad(ids_BH, group) - first_id(self.weight.shape[0], self.mesh)
        here = (ids_nBH >= 0) & (ids_nBH < len(weight))
        none = weight.sum(0).expand(*here.shape, -1)  # of a rank without ids: zeros, with a gradient
        vectors = F.embedding(torch.where(here, ids_nBH, 0), weight) if len(weight) else none
        return reduce_scatter_gather_grad(torch.where(here[..., None], vectors, 0), group)


def first_id(vocabulary_size: int, mesh: DeviceMesh) -> int:
    """Return the first id of this rank's range: DTensor's shards are rounded up, and the last ones may be short."""
    return min(-(-vocabulary_size // mesh.size()) * mesh.get_local_rank(), vocabulary_size)


class VocabularyHead:
    """Computes logits and cross-entropy over a vocabulary that the ranks of `tp` share; every rank gets the whole loss.

    The gradient of the hidden states is a part of a sum over the ranks, as `Sharding.whole` expects.
    """

    def __init__(self, model: MultimodalModel, mesh: DeviceMesh) -> None:
        self.model, self.mesh = model, mesh

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Compute the logits of the ids of this rank, [n, V / tp]."""
        return F.linear(hidden_nD, local(self.model.unembedding_weight))

    def whole(self, logits_nV: Tensor) -> Tensor:
        """Gather the logits [n, V / tp] of each rank to [n, V] on all of them, without a gradient."""
        size = self.model.unembedding_weight.shape[0]
        most = -(-size // self.mesh.size())  # ids of a rank; the last ones may have fewer
        parts = all_gather_no_grad(F.pad(logits_nV, (0, most - logits_nV.shape[1])), self.mesh.get_group())
        return parts.transpose(0, 1).flatten(1)[:, :size]

    def criterion(self, logits_nV: Tensor, labels_n: Tensor) -> Tensor:
        """Compute the cross-entropy of each label over the vocabulary of all ranks, [n] nats."""
        own = labels_n - first_id(self.model.unembedding_weight.shape[0], self.mesh)
        return _VocabularyCrossEntropy.apply(upcast(logits_nV), own, self.mesh.get_group())


class _VocabularyCrossEntropy(torch.autograd.Function):
    """Computes log sum exp(logits) - logit of the label, with maximum and sums over all ranks.

    Megatron-LM (Shoeybi et al. 2019), section 3.
    """

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, label_n: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = logits_nV.shape[1]
        peak = logits_nV.amax(1) if size else logits_nV.new_full((len(logits_nV),), -torch.inf)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        exp_nV = (logits_nV - peak[:, None]).exp()
        here = (label_n >= 0) & (label_n < size)
        at = torch.where(here, label_n, 0)[:, None]
        target = logits_nV.gather(1, at).squeeze(1) - peak if size else peak
        sums = torch.stack([exp_nV.sum(1), torch.where(here, target, 0)])
        dist.all_reduce(sums, group=group)
        total, target = sums
        ctx.save_for_backward(exp_nV / total[:, None], at, here)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None, None]:
        probability_nV, at, here = ctx.saved_tensors
        if probability_nV.shape[1] == 0:
            return probability_nV, None, None
        minus = -here.to(probability_nV.dtype)[:, None]
        return probability_nV.scatter_add(1, at, minus) * grad_n[:, None], None, None
