"""The forward pass of evaluation: no gradients, evaluation mode, the precision of training.

Shape suffixes: B sequences, L positions, N labelled positions, D model width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmoe.models.decoder import MultimodalModel
from mmoe.precision.widen import widen
from mmoe.schema.batch import IGNORE, PackedBatch
from mmoe.training.run import Run


@contextmanager
def inference(run: Run) -> Iterator[MultimodalModel]:
    """The run's model, ready to be measured; it goes back to the mode it was in."""
    training = run.model.training
    run.model.eval()
    try:
        with torch.no_grad(), run.config.precision.autocast(run.device):
            yield run.model
    finally:
        run.model.train(training)


def label_log_probabilities(
    model: MultimodalModel, hidden_BLD: Tensor, batch: PackedBatch, chunk: int
) -> tuple[Tensor, Tensor]:
    """ln p of every label [N] (f32 or wider) and its flat position [N]; `chunk` positions' logits at a time."""
    labels = batch.labels.flatten()
    index_N = (labels != IGNORE).nonzero().squeeze(1)
    hidden_ND, labels_N = hidden_BLD.flatten(0, 1)[index_N], labels[index_N]
    parts = []
    for hidden, label in zip(hidden_ND.split(chunk), labels_N.split(chunk)):
        parts.append(widen(model.logits(hidden)).log_softmax(1).gather(1, label[:, None]).squeeze(1))
    return torch.cat(parts) if parts else widen(hidden_ND).new_empty(0), index_N
