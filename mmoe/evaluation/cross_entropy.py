"""Held-out cross-entropy beside the unigram entropy of the very same tokens."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe.schema.batch import PackedBatch
from mmoe.schema.sample import Modality
from mmoe.tokenizers.vocabulary import Vocabulary


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of `tokens` [n], n >= 1.

    It is the cross-entropy of the best predictor that knows only how often each of these tokens occurs.
    """
    counts = np.unique(tokens, return_counts=True)[1]
    p = counts / counts.sum()
    return float((p * np.log(1 / p)).sum())


@dataclass
class TokenScores:
    """The log-probability of every held-out label, with its source and the modality of the target."""

    vocabulary: Vocabulary
    sources: list[str]
    _labels: list[np.ndarray] = field(default_factory=list)
    _sources: list[np.ndarray] = field(default_factory=list)
    _nll: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: PackedBatch, log_probabilities: Tensor, index: Tensor) -> None:
        """`log_probabilities` [N] of the labels at the flat positions `index` [N]."""
        self._labels.append(batch.labels.flatten()[index].cpu().numpy())
        self._sources.append(batch.source.flatten()[index].cpu().numpy())
        self._nll.append(-log_probabilities.to(torch.float64).cpu().numpy())

    def report(self) -> dict[str, Any]:
        """`val_ce`, `unigram_ce` (nats) and `labels` by modality of the target, and `ce_by_source` likewise."""
        labels, source, nll = (
            np.concatenate(parts) if parts else np.zeros(0) for parts in (self._labels, self._sources, self._nll)
        )
        labels = labels.astype(np.int64)
        kinds = self.vocabulary.modality_of(labels)
        overall = _by_modality(labels, kinds, nll)
        by_source = {
            name: _by_modality(labels[source == number], kinds[source == number], nll[source == number])
            for number, name in enumerate(self.sources)
        }
        return {
            "val_ce": {kind: entry["ce"] for kind, entry in overall.items()},
            "unigram_ce": {kind: entry["unigram"] for kind, entry in overall.items()},
            "labels": {kind: entry["labels"] for kind, entry in overall.items()},
            "ce_by_source": {name: entries for name, entries in by_source.items() if entries},
        }


def _by_modality(labels: np.ndarray, kinds: np.ndarray, nll: np.ndarray) -> dict[str, dict[str, Any]]:
    table = {}
    for kind in np.unique(kinds):
        mine = kinds == kind
        table[Modality(int(kind)).name.lower()] = {
            "ce": float(nll[mine].mean()),
            "unigram": unigram_entropy(labels[mine]),
            "labels": int(mine.sum()),
        }
    return table
