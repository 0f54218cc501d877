"""What a sequence or a step holds, as counts that the plan knows before anything is decoded."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mmoe.schema.sample import KINDS

# Columns of a part's counts: positions, patches, pairs, action elements, attention cost, then labels by modality.
POSITIONS, PATCHES, PAIRS, ACTION_ELEMENTS, COST = range(5)


LABELS = slice(5, 5 + KINDS)


COLUMNS = 5 + KINDS


class Counts(NamedTuple):
    """What a sequence or a step holds, known before anything is decoded: the columns of `mmoe.data.plan.blocks`."""

    columns: np.ndarray  # [COLUMNS] i64

    @property
    def positions(self) -> int:
        """Positions that are not padding."""
        return int(self.columns[POSITIONS])

    @property
    def labels(self) -> np.ndarray:
        """[modalities] by modality of the target."""
        return self.columns[LABELS]

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
        """[2] of attention and of the vision encoder: what replicas are to have equally much of."""
        return self.columns[[COST, PATCHES]]

    @staticmethod
    def total(counts: Iterable["Counts"]) -> "Counts":
        """Add up counts; of none, all are zero."""
        return Counts(sum((c.columns for c in counts), np.zeros(COLUMNS, np.int64)))
