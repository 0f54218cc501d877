"""Shares what one rank of each data replica decodes with its peers: batches, and the steps of a stream, one by one."""

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe.data.load.stream import StepData, Stream
from mmoe.parallel.mesh import Mesh
from mmoe.schema.batch import PackedBatch

ALIGNMENT = 16  # bytes, of every tensor in a message


def shared_steps(stream: Stream, mesh: Mesh, micro_batches: int, device: torch.device) -> Iterator[StepData]:
    """Yield the steps of this replica's stream on each of its ranks, the batches on `device`.

    The first of the ranks reads `stream`; on the others it is left alone. Every rank takes all batches of a step.
    """
    steps = stream.steps() if decodes(mesh) else None
    while True:
        data = next(steps) if steps else None
        header = _send((data.counts, data.plan, data.lost, data.balance) if data else None, mesh.peers, device)
        yield StepData(shared_batches(data.batches if data else iter(()), mesh, micro_batches, device), *header)


def shared_batches(
    batches: Iterator[PackedBatch], mesh: Mesh, number: int, device: torch.device
) -> Iterator[PackedBatch]:
    """Yield the next `number` of this replica's batches on each of its ranks, on `device`.

    The first rank of the replica reads `batches`; the others give an iterator that is left alone. The vectors of
    continuous modalities, nearly all of a batch's bytes, go to the ranks of the first pipeline stage only.
    """
    for _ in range(number):
        batch = next(batches) if decodes(mesh) else None
        layout = _send(replace(batch, values={}) if batch else None, mesh.peers, device)
        if mesh.rank("pp") == 0:
            values = _send(batch.values if batch else None, mesh.group("sequence"), device)
            layout = replace(layout, values=values)
        yield layout


def decodes(mesh: Mesh) -> bool:
    """Return whether this rank decodes the batches of its replica."""
    return dist.get_rank(mesh.peers) == 0


def _send(value: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Send `value` of the group's first rank, its tensors on `device`, to every rank; the others give None."""
    if dist.get_world_size(group) == 1:
        return _on(value, device)
    tensors: list[Tensor] = []
    message: list[Any] = [None]
    if dist.get_rank(group) == 0:
        message = [(_pickled(value, tensors), [(tuple(t.shape), t.dtype) for t in tensors])]
    dist.broadcast_object_list(message, group_src=0, group=group)
    pickled, kinds = message[0]
    sizes = [_aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in kinds]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8)
    for part, tensor in zip(buffer.split(sizes), tensors):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
    buffer = buffer.to(device)
    dist.broadcast(buffer, group_src=0, group=group)
    parts = zip(buffer.split(sizes), kinds, strict=True)
    received = [
        part[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape) for part, (shape, dtype) in parts
    ]
    return _unpickled(pickled, received)


def _on(value: Any, device: torch.device) -> Any:
    tensors: list[Tensor] = []
    pickled = _pickled(value, tensors)
    return _unpickled(pickled, [tensor.to(device, non_blocking=True) for tensor in tensors])


def _pickled(value: Any, tensors: list[Tensor]) -> bytes:
    """Pickle `value` without its tensors, which are added to the list."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> int | None:
            if not isinstance(item, Tensor):
                return None
            tensors.append(item)
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpickled(data: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(data)).load()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
