"""Measures held-out cross-entropy beside the unigram entropy of the very same tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Vocabulary


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of tokens; `counts` [ids] says how often each id occurs, at least one of them.

    It is the cross-entropy of the best predictor that knows only how often each of these tokens occurs.
    """
    p = counts[counts > 0] / counts.sum()
    return float((p * np.log(1 / p)).sum())


class TokenScores:
    """Adds up scores of held-out labels.

    `nll` [sources, modalities] are their negative log-likelihoods in nats, by the modality of the target; `counts`
    [sources, ids] says how often each id is the target.
    """

    def __init__(self, vocabulary: Vocabulary, sources: list[str]) -> None:
        self.sources = sources
        self._kinds = vocabulary.modality_of(np.arange(vocabulary.size)).astype(np.int64)
        self.nll = np.zeros((len(sources), len(Modality)))
        self.counts = np.zeros((len(sources), vocabulary.size), np.int64)

    def add(self, batch: PackedBatch, log_probabilities: Tensor, index: Tensor) -> None:
        """Add the `log_probabilities` [N] of the labels at the flat positions `index` [N]."""
        label, source = (x.flatten()[index].cpu().numpy().astype(np.int64) for x in (batch.labels, batch.source))
        nll = -log_probabilities.double().cpu().numpy()
        self.nll += np.bincount(source * len(Modality) + self._kinds[label], nll, self.nll.size).reshape(self.nll.shape)
        np.add.at(self.counts, (source, label), 1)

    def sum_over(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace the sums of this rank by their `total` over the ranks."""
        self.nll, self.counts = total(self.nll), total(self.counts)

    def report(self) -> dict[str, Any]:
        """Return `val_ce`, `unigram_ce` (nats) and `labels` by modality of the target, and `ce_by_source` likewise."""
        overall = self._by_modality(self.nll.sum(0), self.counts.sum(0))
        by_source = {name: self._by_modality(*sums) for name, *sums in zip(self.sources, self.nll, self.counts)}
        return {
            "val_ce": {kind: entry["ce"] for kind, entry in overall.items()},
            "unigram_ce": {kind: entry["unigram"] for kind, entry in overall.items()},
            "labels": {kind: entry["labels"] for kind, entry in overall.items()},
            "ce_by_source": {name: entries for name, entries in by_source.items() if entries},
        }

    def _by_modality(self, nll: np.ndarray, counts: np.ndarray) -> dict[str, dict[str, Any]]:
        table = {}
        for kind in np.unique(self._kinds[counts > 0]).tolist():
            mine = counts[self._kinds == kind]
            labels = int(mine.sum())
            table[Modality(kind).name.lower()] = {
                "ce": float(nll[kind]) / labels,
                "unigram": unigram_entropy(mine),
                "labels": labels,
            }
        return table
