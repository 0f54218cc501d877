"""Turns every non-visual input that the model has read before an action into sparse feature rows for a linear model.

- of the action's own slice: every state and inertial vector, the histogram of the audio codes, the clip time, and
  the time offset of every member;
- of earlier slices of its document: their state and inertial vectors by lag (up to `LAGS`), how many there are,
  and the mean histogram of their audio codes;
- a bag of the text tokens that stand before it (captions of earlier slices).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmoe.evaluation.actions import chunk_starts
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Structure

LAGS = 8

# A feature key is an integer that means the same in every batch and split: a block, a lag, and a number inside.
_VECTOR, _AUDIO, _CLOCK, _OFFSET, _EARLIER, _TEXT = (block << 48 for block in range(6))
_LAG = 1 << 40

Entries = tuple[np.ndarray, np.ndarray]  # keys and values


@dataclass(frozen=True)
class _Slice:
    vectors: Entries
    audio: Entries  # share of each audio code; the key is its token id
    times: Entries


class FeatureRows:
    """Holds sparse feature rows, one a chunk, and the document part of each; `add` batches first, then read."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._rows: list[Entries] = []

    def add(self, batch: PackedBatch) -> None:
        """Append the rows of every chunk in a batch that is not isolated."""
        starts, parts = chunk_starts(batch)
        self._parts.append(parts)
        self._rows += _rows(batch, starts)

    @cached_property
    def parts(self) -> np.ndarray:
        """Return the document part [M, 4] of each of the M rows."""
        return np.concatenate([*self._parts, np.zeros((0, 4), np.int64)])

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, key and value of every entry."""
        row = np.repeat(np.arange(len(self._rows)), [len(keys) for keys, _ in self._rows])
        return row, *_join(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def frequent(self, most: int) -> tuple[np.ndarray, int]:
        """Return the keys of the `most` features that are most often not zero, sorted, and how many features there are.

        There may be fewer than `most`.
        """
        _, key, value = self._entries
        keys, counts = np.unique(key[value != 0], return_counts=True)
        return np.sort(keys[np.argsort(-counts, kind="stable")[:most]]), len(keys)

    def dense(self, columns: np.ndarray) -> np.ndarray:
        """Return the M rows over the sorted feature keys `columns` [F], as f64 [M, F]; other features are left out."""
        matrix = np.zeros((len(self), len(columns)))
        if len(columns):
            row, key, value = self._entries
            at = np.minimum(np.searchsorted(columns, key), len(columns) - 1)
            known = columns[at] == key
            matrix[row[known], at[known]] = value[known]
        return matrix


def _rows(batch: PackedBatch, starts: np.ndarray) -> list[Entries]:
    length = batch.shape[1]
    names = ("token_ids", "modality", "document", "slice", "camera", "offset_ns")
    flat = {name: getattr(batch, name).flatten().cpu().numpy().astype(np.int64) for name in names}
    vectors: dict[int, np.ndarray] = {}  # flat position -> vector
    for kind in (Modality.STATE, Modality.INERTIAL):
        if kind in batch.values:
            values, index = batch.values[kind].values.double().cpu().numpy(), batch.values[kind].index.tolist()
            vectors |= dict(zip(index, values))
    rows, document = [], None
    earlier: list[_Slice] = []
    for at in starts.tolist():
        sequence, number = at // length, int(flat["document"][at])
        if (sequence, number) != document:
            document, earlier = (sequence, number), []
            first = sequence * length
            begin = first + int(np.argmax(flat["document"][first : first + length] == number))
        before = np.arange(begin, at + 1)
        own = _slice(flat, vectors, before[flat["slice"][before] == flat["slice"][at]])
        text, counts = np.unique(
            flat["token_ids"][before[flat["modality"][before] == Modality.TEXT]], return_counts=True
        )
        entries = [
            own.vectors,
            (_AUDIO + own.audio[0], own.audio[1]),
            own.times,
            (np.array([_EARLIER]), np.array([len(earlier)])),
            (_TEXT + text, counts),
        ]
        for lag, past in enumerate(reversed(earlier[-LAGS:]), start=1):
            entries.append((past.vectors[0] + lag * _LAG, past.vectors[1]))
        if earlier:
            codes, shares = _join([past.audio for past in earlier])
            codes, where = np.unique(codes, return_inverse=True)
            entries.append((_AUDIO + _LAG + codes, np.bincount(where, shares, len(codes)) / len(earlier)))
        rows.append(_join(entries))
        earlier.append(own)
    return rows


def _slice(flat: dict[str, np.ndarray], vectors: dict[int, np.ndarray], at: np.ndarray) -> _Slice:
    """What the slice at flat positions `at` offers, the last of which is its action."""
    modality, ids = flat["modality"][at], flat["token_ids"][at]
    found: list[Entries] = []
    for kind in (Modality.STATE, Modality.INERTIAL):
        for slot, position in enumerate(at[modality == kind].tolist()):
            vector = vectors[position]
            found.append((_VECTOR + (int(kind) << 32) + slot * len(vector) + np.arange(len(vector)), vector))
    codes, counts = np.unique(ids[modality == Modality.AUDIO], return_counts=True)
    seconds = flat["offset_ns"][at] / 1e9
    clock = seconds[ids == Structure.TIMESTAMP]
    kinds, first = np.unique(modality, return_index=True)
    member = np.isin(kinds, (Modality.AUDIO, Modality.INERTIAL, Modality.STATE, Modality.ACTION))
    times = [(np.full(len(clock), _CLOCK), clock), (_OFFSET + kinds[member], seconds[first[member]])]
    return _Slice(_join(found), (codes, counts / max(1, counts.sum())), _join(times))


def _join(parts: list[Entries]) -> Entries:
    keys = [np.asarray(keys, np.int64) for keys, _ in parts]
    values = [np.asarray(values, np.float64) for _, values in parts]
    return np.concatenate([*keys, np.zeros(0, np.int64)]), np.concatenate([*values, np.zeros(0)])
