"""Computes what a manifest says of actions, states and inertial readings: statistics, named values, errors of bins."""

from collections.abc import Collection

import numpy as np

from mmoe.preparation.source_report import SplitReport
from mmoe.preparation.sources.base import Source
from mmoe.preparation.statistics import KNOTS
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer


def vector_stats(source: Source, train: SplitReport, heldout: SplitReport) -> dict[str, VectorStats]:
    """Return the statistics of every vector stream over all rows of the training tables, by modality name.

    Actions have the quantiles that bins are cut at. The held-out tables give only what is clipped of them, and how far
    their values reach; of a source that is all held out they are both, and no tokenizer of a run is made of it.
    """
    stats = {}
    for modality, rows in sorted(train.vectors.items()):
        action = modality is Modality.ACTION
        names, period = source.vector_names[modality.name], source.action_period_ns if action else 0
        stats[modality.name] = rows.stats(names, period, KNOTS if action else 0, heldout.vectors.get(modality))
        if action and source.categories:  # no value of these is a glitch, however rare
            stats[modality.name] = _unfenced(stats[modality.name], source.categories)
    return stats


def _unfenced(stats: VectorStats, dimensions: Collection[str]) -> VectorStats:
    kept = [name in dimensions for name in stats.names]
    low, high = (
        tuple(end if keep else fence for end, fence, keep in zip(ends, fences, kept))
        for ends, fences in ((stats.minimum, stats.low), (stats.maximum, stats.high))
    )
    clipped = {
        split: tuple(0 if keep else count for count, keep in zip(counts, kept))
        for split, counts in stats.clipped.items()
    }
    return stats.model_copy(update={"low": low, "high": high, "clipped": clipped})


def category_counts(source: Source, train: SplitReport) -> dict[str, dict[str, int]]:
    """Count the training rows that have each named value, by dimension of the actions; of many rows an estimate."""
    if Modality.ACTION not in train.vectors:
        return {}
    summary, names = train.vectors[Modality.ACTION], source.vector_names[Modality.ACTION.name]
    rows = summary.sample()
    found = {}
    for name, values in source.categories.items():
        counts = np.bincount(rows[:, names.index(name)].astype(np.int64), minlength=len(values))
        found[name] = dict(zip(values, np.rint(counts * (summary.count / len(rows))).astype(np.int64).tolist()))
    return found


def round_trip(manifest: SourceManifest, rows: np.ndarray) -> str:
    """Say how exact uniform bins are, of `rows` [N, A] of actions written and read back."""
    tokenizer = ActionTokenizer(
        ActionConfig(mode="discrete"), manifest.vectors[Modality.ACTION.name], manifest.categories
    )
    errors = tokenizer.round_trip_error(rows[:, tokenizer.columns]).items()
    said = ", ".join(f"{name} {error:.2g}" for name, error in errors)
    return f"actions: root mean square error of {tokenizer.config.bins} uniform bins: {said or 'all are named values'}"
