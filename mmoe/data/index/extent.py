"""Count how much a split holds by kinds of segments: enough to size a mixture for any tokenizer, without an index.

Segments that differ in nothing but their length take positions that follow from their number and total length. A
split of a billion samples has few such groups (cameras of one size, audio clips of one rate); images of the web have
many sizes, so sizes are rounded, ever more coarsely, until there are no more than `MOST_GROUPS`.
"""

from collections import Counter

import numpy as np

from mmoe.schema.manifest import SegmentGroup
from mmoe.schema.modality import Modality

MOST_GROUPS = 512

_Group = tuple[int, bool, bool, int, int, int]  # modality, sliced, camera, height, width, rate


class Extent:
    """Counts segments by group, and the samples that are clips of time slices."""

    def __init__(self) -> None:
        self.counts: Counter[_Group] = Counter()
        self.spans: Counter[_Group] = Counter()
        self.clips = 0
        self.slices = 0

    def add(self, segments: np.ndarray) -> None:
        """Count the segments of one sample, `SEGMENT_DTYPE` [n]."""
        slices = set(segments["slice"].tolist()) - {-1}
        self.clips += bool(slices)
        self.slices += len(slices)
        for kind, number, camera, height, width, rate, start, stop in segments[
            ["modality", "slice", "camera", "height", "width", "rate", "start", "stop"]
        ].tolist():
            group = (kind, number >= 0, camera >= 0, height, width, rate)
            self.counts[group] += 1
            # The range of an action is its row and the rows after it: it says nothing about its size.
            self.spans[group] += 0 if kind == Modality.ACTION else stop - start

    def segments(self, modality: Modality) -> int:
        """Return the number of segments of this modality."""
        return sum(count for group, count in self.counts.items() if group[0] == modality)

    def merge(self, other: "Extent") -> None:
        """Add what another part of the split holds."""
        self.counts.update(other.counts)
        self.spans.update(other.spans)
        self.clips += other.clips
        self.slices += other.slices

    def groups(self) -> tuple[SegmentGroup, ...]:
        """Return the groups in a fixed order; beyond `MOST_GROUPS`, image sizes are rounded to powers of two."""
        counts, spans, step = self.counts, self.spans, 8
        while len(counts) > MOST_GROUPS:
            counts, spans = _coarser(counts, step), _coarser(spans, step)
            step *= 2
        return tuple(
            SegmentGroup(
                modality=Modality(kind).name,
                sliced=sliced,
                camera=camera,
                height=height,
                width=width,
                rate=rate,
                count=counts[kind, sliced, camera, height, width, rate],
                span=spans[kind, sliced, camera, height, width, rate],
            )
            for kind, sliced, camera, height, width, rate in sorted(counts)
        )


def _coarser(counts: Counter[_Group], step: int) -> Counter[_Group]:
    """The same counts with heights and widths rounded to the nearest multiple of `step` (at least one of them)."""
    rounded: Counter[_Group] = Counter()
    for (kind, sliced, camera, height, width, rate), count in counts.items():
        if kind == Modality.VISION:
            height, width = (max(step, (side + step // 2) // step * step) for side in (height, width))
        rounded[kind, sliced, camera, height, width, rate] += count
    return rounded
