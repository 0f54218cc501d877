"""Runs the forward passes of evaluation: no gradients, evaluation mode, the precision of training, on all ranks.

Every rank runs the same code: each data replica sees its share of the batches, the heads' figures are those of its own
batches, and `Inference.total` and `Inference.in_order` bring them together. So a measure is written once, as a sum or
as small arrays by the number of their batch, and equals that of one process in any layout.

Shape suffixes: B sequences, L positions, N labeled positions, n chosen positions, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mmoe.losses.loss_share import FULL_SHARE, LossShare
from mmoe.models.decoder import MultimodalModel
from mmoe.parallel.ranks import SharedBatches
from mmoe.runtime import agreement
from mmoe.schema.batch import IGNORE, PackedBatch
from mmoe.training.run import Run

T = TypeVar("T")

# Told after each round of batches: what is measured, how many of its batches are done, and of how many.
MeasureProgress = Callable[[str, int, int], None]


class Inference:
    """Holds a run's model as it is spread over the ranks, ready to be measured; all ranks call its methods together."""

    def __init__(self, run: Run, progress: MeasureProgress | None = None) -> None:
        self.run, self.ranks, self.model = run, run.ranks, run.model
        self._progress = progress
        self._part = run.ranks.part(run.model)

    def outputs(self, batches: SharedBatches, what: str) -> Iterator[tuple[int, PackedBatch, Tensor]]:
        """Run the batches through the model; yield number, batch and hidden states [B, L, D] of those of this replica.

        On ranks that have no heads nothing is yielded. Every replica runs equally many; one that has no batch left runs
        an empty one, which is not yielded. `what` names the measure for the progress.
        """
        most, replica, replicas = len(batches), self.ranks.replica, self.ranks.replicas
        for turn, batch in enumerate(self.ranks.batches(batches)):
            batch = batch.to(self.run.device)
            hidden = self.ranks.hidden(self.model, batch)
            number = turn * replicas + replica
            if hidden is not None and number < most:
                yield number, batch, hidden
            if self._progress is not None:
                self._progress(what, min((turn + 1) * replicas, most), most)

    def label_log_probabilities(self, hidden_BLD: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return ln p of every label [N] (f32 or wider) and its flat position [N], wherever the vocabulary lies.

        `hidden_BLD` are the hidden states of `batch`.
        """
        chunk = self.run.config.losses.ce.chunk
        return label_log_probabilities(self.model, hidden_BLD, batch, chunk, self._part)

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Return the scores [n, V] of all ids from the hidden states `hidden_nD`."""
        return self.ranks.logits(self.model, hidden_nD)

    def total(self, table: np.ndarray) -> np.ndarray:
        """Add up the counts `table` of all replicas; every rank gets the same sum."""
        if not dist.is_initialized():
            return table
        mine = torch.from_numpy(table if self.ranks.speaks else np.zeros_like(table)).clone()
        dist.all_reduce(mine)
        return mine.numpy()

    def in_order(self, parts: dict[Any, T]) -> list[T]:
        """Gather the results of all batches, `parts` by batch number, in the order of one process.

        They are on rank 0; elsewhere the list is empty.
        """
        everywhere = agreement.ProcessGroupRanks().gather(parts if self.ranks.speaks else {})
        together = {number: part for mine in everywhere for number, part in mine.items()}
        return [together[number] for number in sorted(together)]


@contextmanager
def inference(run: Run, progress: MeasureProgress | None = None) -> Iterator[Inference]:
    """Make the run's model ready to be measured; it goes back to the mode it was in, and its weights to their shards.

    With a process group all ranks enter it. `progress` is told of every round of batches.
    """
    training = run.model.training
    run.model.eval()
    try:
        with torch.no_grad(), run.config.precision.autocast(run.device):
            yield Inference(run, progress)
    finally:
        run.model.train(training)
        for module in run.model.modules():  # a backward pass would have done this
            if isinstance(module, FSDPModule):
                module.reshard()


def label_log_probabilities(
    model: MultimodalModel, hidden_BLD: Tensor, batch: PackedBatch, chunk: int, part: LossShare = FULL_SHARE
) -> tuple[Tensor, Tensor]:
    """Return ln p of every label [N] (f32 or wider) of a batch, and its flat position [N].

    Logits are made for `chunk` positions at a time. `part` says how the vocabulary is shared; whatever else it says,
    these are all labels of the batch.
    """
    head = part.head or model.logits
    labels = batch.labels.flatten()
    index_N = (labels != IGNORE).nonzero().squeeze(1)
    hidden_ND, labels_N = hidden_BLD.flatten(0, 1)[index_N], labels[index_N]
    parts = []
    for hidden, label in zip(hidden_ND.split(chunk), labels_N.split(chunk)):
        parts.append(-part.criterion(head(hidden), label))
    return torch.cat(parts) if parts else hidden_ND.new_empty(0), index_N
