"""Measures how often the named values of actions are the right ones, beside always saying the most frequent one."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from mmoe.evaluation.inference import Inference
from mmoe.schema.batch import PackedBatch
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.bundle import Tokenizers


class CategoryScores:
    """Adds up by source and id of a named value how often it was logged, and how often it was then the likeliest.

    Likeliest among the values of its own dimension that its source has.
    """

    def __init__(self, tokenizers: Tokenizers, manifests: dict[str, SourceManifest]) -> None:
        self._tokenizers, self._manifests, self.sources = tokenizers, manifests, list(manifests)
        self._ids = tokenizers.vocabulary.ranges["category"]
        self.logged = np.zeros((len(manifests), len(self._ids)), np.int64)
        self.right = np.zeros_like(self.logged)

    def add(self, model: Inference, hidden: Tensor, batch: PackedBatch) -> None:
        """Add the labels of a batch with the hidden states [B, L, D]; ranks that hold a part of the ids call it too."""
        labels, sources = (x.flatten().cpu().numpy() for x in (batch.labels, batch.source))
        for number, name in enumerate(self.sources):
            for dimension, values in self._manifests[name].categories.items():
                ids = self._tokenizers.category_ids(dimension, values)
                at = np.flatnonzero(np.isin(labels, ids) & (sources == number))
                if not len(at):
                    continue
                scores = model.logits(hidden.flatten(0, 1)[at])[:, ids].float().cpu().numpy()
                said = ids[scores.argmax(1)]
                local = labels[at] - self._ids.start
                self.logged[number] += np.bincount(local, minlength=len(self._ids))
                self.right[number] += np.bincount(local[said == labels[at]], minlength=len(self._ids))

    def sum_over(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace the sums of this rank by their `total` over the ranks."""
        self.logged, self.right = total(self.logged), total(self.right)

    def report(self) -> dict[str, dict[str, Any]]:
        """Return by source and dimension: `accuracy`, that of the most `frequent` value of training, `labels`."""
        found: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(self.sources):
            for dimension, counts in self._manifests[name].categories.items():
                mine = self._tokenizers.category_ids(dimension, counts) - self._ids.start
                labels = int(self.logged[number, mine].sum())
                if labels:
                    most = max(counts, key=lambda value: counts[value])
                    found.setdefault(name, {})[dimension] = {
                        "accuracy": self.right[number, mine].sum() / labels,
                        "most_frequent": self.logged[number, mine[list(counts).index(most)]] / labels,
                        "frequent": most,
                        "labels": labels,
                    }
        return found
