"""What a layout is made of, each by itself: collectives, an exchange of rows, a vocabulary with short shards."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmoe.parallel.collectives import (
    AllToAll,
    all_gather_replicated,
    all_gather_scatter_grad,
    reduce_scatter_gather_grad,
)
from mmoe.parallel.tensor import VocabularyEmbedding, VocabularyHead, first_id
from tests.distributed.pool import Pool


def rows(rank: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gathered() -> tuple[torch.Tensor, ...]:
    """The gradients of this rank's rows, where rank r's loss weighs everything by r + 1."""
    rank, group = dist.get_rank(), dist.group.WORLD
    weight = torch.arange(12.0, dtype=torch.float64).view(2, 3, 2) * (rank + 1)
    x, y, z = (rows(rank).requires_grad_() for _ in range(3))
    out, same = all_gather_scatter_grad(x, group), all_gather_replicated(y, group)
    assert torch.equal(out, torch.stack([rows(0), rows(1)])) and torch.equal(same, out)
    parts = reduce_scatter_gather_grad(torch.stack([z, 2 * z]), group)
    assert torch.equal(parts, (rank + 1) * (rows(0) + rows(1)))
    ((out * weight).sum() + (same * weight).sum() + (parts * (rank + 1)).sum()).backward()
    return x.grad, y.grad, z.grad


def test_gradients_of_gather_join_and_split_sum(two: Pool) -> None:
    weight = torch.arange(12.0, dtype=torch.float64).view(2, 3, 2)
    for rank, (gather_grad, join_grad, split_grad) in enumerate(two.run(gathered)):
        assert torch.equal(gather_grad, weight[rank] * (1 + 2))  # summed over the ranks that read it
        assert torch.equal(join_grad, weight[rank] * (rank + 1))  # the own use, once
        assert torch.equal(split_grad, torch.full_like(split_grad, 1 * 1 + 2 * 2))  # of what either half adds to


def exchanged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank 0 keeps one row and sends two, rank 1 sends none of its three to rank 0."""
    rank = dist.get_rank()
    sent, received = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    exchange = AllToAll(received, sent, dist.group.WORLD)
    x = rows(rank).requires_grad_()
    arrived = exchange.start(x)
    exchange.wait()
    back = exchange.reverse(arrived * (rank + 1))
    back.sum().backward()
    return arrived.detach(), back.detach(), x.grad


def test_an_exchange_of_unequal_shares_and_its_way_back(two: Pool) -> None:
    (first, first_back, first_grad), (second, second_back, second_grad) = two.run(exchanged)
    assert torch.equal(first, rows(0)[:1]) and torch.equal(second, torch.cat([rows(0)[1:], rows(1)]))
    factor = torch.tensor([[1.0], [2.0], [2.0]], dtype=torch.float64)
    assert torch.equal(first_back, rows(0) * factor) and torch.equal(second_back, rows(1) * 2)
    assert torch.equal(first_grad, factor.expand(3, 2)) and torch.equal(second_grad, torch.full_like(second_grad, 2))


class Tied(nn.Module):
    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    @property
    def unembedding_weight(self) -> torch.Tensor:
        return self.embedding.weight


def vocabulary(size: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number of ids here, the losses, and the gradients of table and vectors added up over the ranks."""
    mesh, table = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), whole_table(size)
    embedding = VocabularyEmbedding(table, mesh)
    ids = torch.arange(8).remainder(size).view(4, 1, 2)
    looked_up = embedding(ids[mesh.get_local_rank()])
    hidden = all_gather_scatter_grad(looked_up, mesh.get_group()).flatten(0, 2)
    head = VocabularyHead(Tied(embedding), mesh)
    losses = head.criterion(head.logits(hidden), ids.flatten())
    losses.sum().backward()
    return len(embedding.weight.to_local()), losses.detach(), embedding.weight.grad.full_tensor(), looked_up.detach()


def whole_table(size: int) -> nn.Embedding:
    table = nn.Embedding(size, 3, dtype=torch.float64)
    nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    return table


@pytest.mark.parametrize(("size", "shards"), [(8, [2, 2, 2, 2]), (7, [2, 2, 2, 1]), (5, [2, 2, 1, 0])])
def test_a_vocabulary_of_any_size_with_short_and_empty_shards(four: Pool, size: int, shards: list[int]) -> None:
    table = whole_table(size)
    ids = torch.arange(8).remainder(size)
    vectors = table(ids)
    expected = F.cross_entropy(vectors @ table.weight.T, ids, reduction="none")
    expected.sum().backward()
    outcomes = four.run(vocabulary, size)
    assert [outcome[0] for outcome in outcomes] == shards
    for _, losses, gradient, _ in outcomes:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, table.weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.cat([outcome[3].flatten(0, 1) for outcome in outcomes]), vectors.detach())


def first_ids() -> list[tuple[int, int]]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    found = []
    for size in range(1, 20):
        shard = distribute_tensor(torch.arange(size), mesh, [Shard(0)], src_data_rank=None).to_local()
        found.append((first_id(size, mesh), int(shard[0]) if len(shard) else size))
    return found


def test_the_first_id_is_where_the_shard_begins(four: Pool) -> None:
    for found in four.run(first_ids):
        assert all(said == true for said, true in found)
