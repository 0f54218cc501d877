"""Measure the cost of a document from its index row alone: positions, patches, labels, pairs, action elements.

The closed forms of `mmoe.modalities` and the layout in `mmoe.modalities.document` state the same thing twice, on
purpose: planning needs the counts of millions of rows without building one. A property test holds them equal.
"""

from dataclasses import dataclass, fields

import numpy as np

from mmoe.data.index.shard_index import SegmentTable
from mmoe.errors import ConfigError
from mmoe.schema.counts import count_names
from mmoe.schema.manifest import SplitEntry
from mmoe.schema.modality import BUILT_IN, Modality, Planned
from mmoe.schema.sample import GIVEN
from mmoe.tokenizers.bundle import Tokenizers


@dataclass(frozen=True)
class Measures:
    """Holds counts by row, [n] i64; `labels` is [n, modalities], by the modality of the target."""

    length: np.ndarray  # positions of the document packed in one piece
    isolated: np.ndarray  # positions when every pair's text is a document of its own
    labels: np.ndarray
    isolated_labels: np.ndarray
    pairs: np.ndarray
    counted: np.ndarray  # [n, names]: what modalities count, by `count_names`
    isolated_cost: np.ndarray  # sum of squared document lengths (attention work) when pairs' texts stand alone
    slices: np.ndarray
    text_only: np.ndarray  # bool: nothing but text, so it may be cut at any token

    def count(self, name: str) -> np.ndarray:
        """Return the count by row of what a modality names among its `count_columns`."""
        return self.counted[:, count_names().index(name)]

    def take(self, rows: np.ndarray) -> "Measures":
        """Return the measures of these rows, by their numbers or a mask."""
        return Measures(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def concatenate(parts: list["Measures"]) -> "Measures":
        """Join the measures of parts, one or more, in their order."""
        return Measures(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Measures)))


def plan_segments(segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
    """Plan how much each of the segments [n] takes in a sequence, by what their modalities say."""
    kind, n = np.ascontiguousarray(segments["modality"]), len(segments)
    tokens, around, labels = (np.zeros(n, np.int64) for _ in range(3))
    closing, columns = np.zeros(n, bool), dict[str, np.ndarray]()
    for code in _present(kind):
        chosen = np.flatnonzero(kind == code)
        spec = Modality(code).spec
        planned = spec.planned(segments[chosen], tokenizers, source)
        if planned.columns.keys() != set(spec.count_columns):
            given, named = (", ".join(sorted(each)) or "nothing" for each in (planned.columns, spec.count_columns))
            raise ConfigError(f"modality {spec.name} plans {given}, but its count_columns name {named}; name the same")
        if code >= BUILT_IN and planned.labels.any():
            raise ConfigError(
                f"modality {spec.name} plans labels, but no id of the vocabulary is its own; leave its targets for a "
                "loss term by the builder's `target`"
            )
        tokens[chosen], around[chosen] = planned.tokens, planned.around
        if planned.labels.any() or planned.closing.any():
            labels[chosen], closing[chosen] = planned.labels, planned.closing
        for name, counted in planned.columns.items():
            columns.setdefault(name, np.zeros(n, np.int64))[chosen] = counted
    return Planned(tokens, around, labels, closing, columns)


def _present(kinds: np.ndarray) -> list[int]:
    """The codes among u8 [n], in order; a plan asks for millions, and counting them is quicker than sorting."""
    return np.flatnonzero(np.bincount(kinds)).tolist()


def measure_documents(
    segments: np.ndarray, row: np.ndarray, rows: int, tokenizers: Tokenizers, source: str
) -> Measures:
    """Measure `rows` documents whose segments are `segments` [n], segment i belonging to document `row[i]`."""
    kind = np.ascontiguousarray(segments["modality"])
    plan = plan_segments(segments, tokenizers, source)
    tokens, in_slice = plan.tokens, segments["slice"] >= 0
    text, vision = kind == Modality.TEXT, kind == Modality.VISION

    before = np.arange(len(segments)) - 1
    same_row = (before >= 0) & (row[before] == row)
    same_slice = same_row & (segments["slice"][before] == segments["slice"])
    opens_slice = in_slice & ~same_slice
    around = plan.around + 3 * opens_slice  # slice_start, timestamp, slice_end

    def total(values: np.ndarray) -> np.ndarray:
        if not values.any():
            return np.zeros(rows, np.int64)
        return np.bincount(row, weights=values, minlength=rows).astype(np.int64)

    def counted(name: str) -> np.ndarray:
        return total(plan.columns[name]) if name in plan.columns else np.zeros(rows, np.int64)

    slices = total(opens_slice)
    length = total(tokens + around) + 2 + 2 * (slices > 0)  # bos, eos; video_start, video_end
    pair_text = text & (segments["pair"] >= 0) & (tokens > 0)
    pairs = total(pair_text)
    isolated_tokens = np.where(pair_text, tokens, 0)
    rest = length - total(isolated_tokens)

    said = text & (plan.labels > 0)  # and not given
    # A text that follows an image of its slice with no structure token between them: its first token is the
    # target of a VISION position, which carries no label.
    unlabeled = said & in_slice & same_slice & vision[before]
    labels = np.zeros((rows, len(Modality)), np.int64)
    for code in _present(kind[plan.labels > 0]):
        labels[:, code] = total(np.where(kind == code, plan.labels - unlabeled, 0))
    # A text predicts the structure token behind it where it ends its slice or document: not before an action.
    ends = np.ones(len(segments), bool)
    ends[:-1] = ~same_slice[1:]
    labels[:, Modality.STRUCTURE] = total((said & ends) | plan.closing)
    isolated_labels = labels.copy()
    isolated_labels[:, Modality.TEXT] += total(unlabeled & pair_text)
    isolated_labels[:, Modality.STRUCTURE] += total(pair_text & said & ~ends)
    return Measures(
        length=length,
        isolated=length + 2 * pairs,
        labels=labels,
        isolated_labels=isolated_labels,
        pairs=pairs,
        counted=np.stack([counted(name) for name in count_names()], axis=1),
        isolated_cost=rest**2 + total(np.where(pair_text, (isolated_tokens + 2) ** 2, 0)),
        slices=slices,
        text_only=total(~text) == 0,
    )


def measure_index(table: SegmentTable, tokenizers: Tokenizers, source: str) -> Measures:
    """Measure every row of a shard."""
    row = np.repeat(np.arange(len(table)), np.diff(table.segment_offsets))
    return measure_documents(table.segments, row, len(table), tokenizers, source)


def targets_before(table: SegmentTable, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Count the targets among the first `tokens` [n] text tokens of the rows [n], which hold nothing but text."""
    length = table.segments["stop"] - table.segments["start"]
    predicted = np.append(table.segments["rate"] != GIVEN, False)
    upto = np.concatenate([[0], np.cumsum(length)])  # tokens before each segment of the table, and targets
    targets = np.concatenate([[0], np.cumsum(length * predicted[:-1])])
    first = table.segment_offsets[rows]
    at = upto[first] + tokens
    segment = np.searchsorted(upto, at, side="right") - 1
    return targets[segment] + (at - upto[segment]) * predicted[segment] - targets[first]


def measure_slices(
    table: SegmentTable, rows: np.ndarray, tokenizers: Tokenizers, source: str
) -> tuple[Measures, np.ndarray]:
    """Measure every time slice of the rows [n] (increasing) as a document of its own; also count slices by row.

    Four positions of each (bos, video_start, video_end, eos) belong to the clip and not to the slice.
    """
    chosen = np.zeros(len(table), bool)
    chosen[rows] = True
    row = np.repeat(np.arange(len(table)), np.diff(table.segment_offsets))
    inside = chosen[row] & (table.segments["slice"] >= 0)
    segments, row = table.segments[inside], row[inside]
    opens = np.ones(len(segments), bool)
    opens[1:] = (segments["slice"][1:] != segments["slice"][:-1]) | (row[1:] != row[:-1])
    each = measure_documents(segments, np.cumsum(opens) - 1, int(opens.sum()), tokenizers, source)
    return each, np.bincount(row[opens], minlength=len(table))[rows]


def epoch_positions(split: SplitEntry, tokenizers: Tokenizers, source: str) -> int:
    """Count the positions of all documents of a split in one piece, from the manifest's groups of segments alone.

    Exact but for lengths that differ inside a group: the last code frame of an audio clip, and rounded image sizes.
    """
    # bos, eos; video_start, video_end; slice_start, timestamp, slice_end
    total = 2 * split.samples + 2 * split.clips + 3 * split.slices
    for group in split.groups:
        total += Modality.named(group.modality).spec.positions(group, tokenizers, source)
    return total
