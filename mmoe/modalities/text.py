"""Makes a modality of text, stored token ids.

What stands around it depends on what it follows, which is measured with its document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe.schema.modality import ModalitySpec, Planned
from mmoe.schema.sample import GIVEN

if TYPE_CHECKING:
    from mmoe.schema.manifest import SegmentGroup
    from mmoe.tokenizers.bundle import Tokenizers


class TextSpec(ModalitySpec):
    """Makes every token of a text a target, but of a text that is given."""

    name = "TEXT"

    def planned(self, segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
        """Plan the ranges of stored ids."""
        tokens = (segments["stop"] - segments["start"]).astype(np.int64)
        plan = Planned.without_targets(tokens)
        return Planned(tokens, plan.around, np.where(segments["rate"] == GIVEN, 0, tokens), plan.closing)

    def positions(self, group: SegmentGroup, tokenizers: Tokenizers, source: str) -> int:
        """Count the ids."""
        return group.span


SPEC = TextSpec()
