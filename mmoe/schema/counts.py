"""Counts what a sequence or a step holds; the plan knows it before anything is decoded."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mmoe.schema.modality import BUILT_IN, Modality

# Columns of a part's counts: these, then labels by modality, then what further modalities count (`count_columns`).
POSITIONS, PATCHES, PAIRS, ACTION_ELEMENTS, COST = range(5)
FIXED_COLUMNS = 5
_NAMED = {"patches": PATCHES, "action_elements": ACTION_ELEMENTS}  # of the built-in modalities


def labels() -> slice:
    """Give the columns of the labels, one a modality."""
    return slice(FIXED_COLUMNS, FIXED_COLUMNS + len(Modality))


def columns() -> int:
    """Count the columns."""
    return labels().stop + len(_further())


def column(name: str) -> int:
    """Find the column of what a modality counts. Raises KeyError where none counts it."""
    if name not in count_names():
        raise KeyError(f"no modality counts {name}; known are {', '.join(count_names())}")
    return count_columns()[count_names().index(name)]


def count_names() -> list[str]:
    """Name what modalities count beside positions and labels."""
    return [*_NAMED, *_further()]


def count_columns() -> list[int]:
    """Give the columns of `count_names`."""
    return [*_NAMED.values(), *range(labels().stop, columns())]


def zeros() -> np.ndarray:
    """Make the columns of nothing, i64 [columns]."""
    return np.zeros(columns(), np.int64)


def _further() -> list[str]:
    return [name for kind in Modality if kind >= BUILT_IN for name in kind.spec.count_columns]


class Counts(NamedTuple):
    """Counts what a sequence or a step holds, known before anything is decoded."""

    columns: np.ndarray  # i64 [columns()]

    @property
    def positions(self) -> int:
        """Positions that are not padding."""
        return int(self.columns[POSITIONS])

    @property
    def labels(self) -> np.ndarray:
        """Count the labels by modality of their target, [modalities]."""
        return self.columns[labels()]

    @property
    def action_elements(self) -> int:
        """Count the elements of action targets: steps inside the recording x dimensions."""
        return int(self.columns[ACTION_ELEMENTS])

    @property
    def pairs(self) -> int:
        """Count the contrastive pairs."""
        return int(self.columns[PAIRS])

    @property
    def patches(self) -> int:
        """Count the VISION vectors."""
        return int(self.columns[PATCHES])

    @property
    def cost(self) -> int:
        """Attention work: the sum of squared document lengths."""
        return int(self.columns[COST])

    @property
    def work(self) -> np.ndarray:
        """Give the work of attention and of the vision encoder, [2]: what replicas are to have equally much of."""
        return self.columns[[COST, PATCHES]]

    def count(self, name: str) -> int:
        """Count what a modality names among its `count_columns`."""
        return int(self.columns[column(name)])

    @staticmethod
    def total(counts: Iterable["Counts"]) -> "Counts":
        """Add up counts; of none, all are zero."""
        return Counts(sum((c.columns for c in counts), zeros()))
