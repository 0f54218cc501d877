"""Read a source block by block as an endless, keyed order of documents.

An epoch is a keyed permutation of the source's shards, cut into blocks of a few shards, then a keyed permutation of
the rows inside each block. A block is a table of *parts*: one for a document that fits a sequence, several for a
longer one, cut at slices or text tokens. Building it reads the columns of the index that planning needs and nothing
else, and everything is done on whole arrays: a plan is made for millions of documents.
"""

from dataclasses import dataclass, fields

import numpy as np

from mmoe.addresses import join_address, local_path
from mmoe.data.index.shard_index import SegmentTable
from mmoe.data.plan.measure import Measures, epoch_positions, measure_index, measure_slices, targets_before
from mmoe.data.storage.store import Storage
from mmoe.errors import ConfigError, DataError
from mmoe.hashing import INCREMENT, mixed_u64
from mmoe.schema.counts import COST, PAIRS, PATCHES, POSITIONS, columns, count_columns, labels, zeros
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.tokenizers.bundle import Tokenizers

# A part of a document: units `first`..`last` of a row are text tokens where the row is text alone, slices where it has
# slices, else 0..1 for the whole. `length` is the positions it takes, all its isolated texts included.
PART_DTYPE = np.dtype(
    [
        ("source", "i2"),
        ("shard", "i4"),
        ("row", "i4"),
        ("part", "i2"),
        ("first", "i4"),
        ("last", "i4"),
        ("isolated", "?"),
        ("is_last", "?"),  # the part that ends the document
        ("length", "i4"),
    ]
)

FITS, CUT_TEXT, CUT_SLICES, TOO_LONG, SLICE_TOO_LONG = range(5)
OUTCOMES = (
    "",
    "cut at a text token",
    "cut at a slice",
    "dropped: longer than a sequence",
    "dropped: a slice longer than a sequence",
)


@dataclass(frozen=True)
class SequenceBudget:
    """Says how much a sequence holds, and which pairs become two documents."""

    seed: int
    sequence_length: int
    patches_per_sequence: int
    isolated_pair_share: float


@dataclass(frozen=True)
class ShuffleBlock:
    """Holds a block of documents in drawn order, each as one or several parts.

    Document d is ``parts[offsets[d]:offsets[d + 1]]``; `counts` is [parts, columns] i64. `lengths` [documents] i64 is
    the positions a document takes in all its parts, `outcome` u1 what became of it.
    """

    parts: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    outcome: np.ndarray

    def __len__(self) -> int:
        return len(self.outcome)


class PlannedSource:
    """Orders the documents of one split of a prepared source without end; it keeps a block, and the next, in memory."""

    def __init__(
        self,
        number: int,
        name: str,
        folder: str,
        manifest: SourceManifest,
        split: str,
        limits: SequenceBudget,
        tokenizers: Tokenizers,
        storage: Storage,
        block_shards: int = 16,
    ) -> None:
        entry = manifest.splits.get(split)
        if entry is None or not entry.samples:
            raise DataError(f"{folder}/source.json: the split {split} is empty; prepare {name} from more recordings")
        self.number, self.name, self.limits, self.tokenizers = number, name, limits, tokenizers
        self.shards = [join_address(folder, shard.path) for shard in entry.shards]
        self._digests = [shard.digest for shard in entry.shards]
        self.shard_rows = np.array([shard.rows for shard in entry.shards])
        self.rows = int(self.shard_rows.sum())
        self.mean_length = epoch_positions(entry, tokenizers, name) / self.rows
        self._storage, self._block_shards = storage, block_shards
        self._epoch = (-1, np.zeros(0, np.int64), np.zeros(0, np.int64))  # its number, shard order, ends of its blocks
        self._blocks: dict[tuple[int, int], ShuffleBlock] = {}  # of those last asked for: one that ends, and the next
        self._measured: dict[int, tuple[SegmentTable, Measures]] = {}  # by shard, of a source that is one block

    def at(self, counter: int) -> tuple[ShuffleBlock, int]:
        """Return the block that document number `counter` of the endless order lies in, and its place there."""
        epoch, within = divmod(counter, self.rows)
        if self._epoch[0] != epoch:
            order = rng(self.limits.seed, self.number, epoch).permutation(len(self.shards))
            rows = self.shard_rows[order]
            last = np.append(np.arange(self._block_shards, len(rows), self._block_shards), len(rows)) - 1
            self._epoch = (epoch, order, np.cumsum(rows)[last])
        _, order, ends = self._epoch
        number = int(np.searchsorted(ends, within, side="right"))
        start = int(ends[number - 1]) if number else 0
        if (epoch, number) not in self._blocks:
            while len(self._blocks) > 1:
                self._blocks.pop(next(iter(self._blocks)))
            shards = order[number * self._block_shards : (number + 1) * self._block_shards]
            rows = rng(self.limits.seed, self.number, epoch, number).permutation(int(self.shard_rows[shards].sum()))
            self._blocks[epoch, number] = self._build(shards, rows, epoch * self.rows + start)
        return self._blocks[epoch, number], within - start

    def once(self, shard: int, rows: np.ndarray, counter: int) -> ShuffleBlock:
        """Return the given rows of a shard in their order, as documents number `counter` and after."""
        return self._build(np.array([shard]), rows, counter)

    def _build(self, shards: np.ndarray, rows: np.ndarray, counter: int) -> ShuffleBlock:
        """The block of `rows` [documents], numbered through the `shards`; document d draws its key at counter + d."""
        tables, measured = zip(*self._measure(shards.tolist()), strict=True)
        measures = Measures.concatenate(list(measured))
        shard = np.repeat(shards, self.shard_rows[shards])[rows]
        row = np.concatenate([np.arange(self.shard_rows[s]) for s in shards])[rows]
        measures = measures.take(rows)

        isolated = measures.pairs > 0
        if isolated.any():
            isolated &= units(self.limits.seed, self.number, counter, len(rows)) < self.limits.isolated_pair_share
        length = np.where(isolated, measures.isolated, measures.length)
        fits = (length <= self.limits.sequence_length) & (measures.count("patches") <= self.limits.patches_per_sequence)
        outcome = np.select(
            [fits, measures.text_only, measures.slices > 0], [FITS, CUT_TEXT, CUT_SLICES], default=TOO_LONG
        ).astype(np.uint8)

        whole = np.flatnonzero(outcome == FITS)
        last = np.where(measures.text_only, length - 2, np.maximum(measures.slices, 1))[whole]
        pieces = [_Pieces(whole, np.zeros_like(whole), last, _counts(measures.take(whole), isolated[whole]))]
        borders = np.concatenate([[0], np.cumsum(self.shard_rows[shards])])
        if (outcome == CUT_TEXT).any():
            chosen = np.flatnonzero(outcome == CUT_TEXT)
            pieces.append(self._cut_texts(chosen, measures.take(chosen), tables, borders, rows))
        if (outcome == CUT_SLICES).any():
            cut, dropped = self._cut_clips(np.flatnonzero(outcome == CUT_SLICES), tables, borders, rows, isolated)
            pieces.append(cut)
            outcome[dropped] = SLICE_TOO_LONG
        joined = _Pieces.join(pieces)
        document = joined.document
        order = np.lexsort((joined.first, document))
        document, counts = document[order], joined.counts[order]

        parts = np.zeros(len(document), PART_DTYPE)
        parts["source"], parts["shard"], parts["row"] = self.number, shard[document], row[document]
        parts["first"], parts["last"] = joined.first[order], joined.last[order]
        parts["isolated"], parts["length"] = isolated[document], counts[:, POSITIONS]
        offsets = np.searchsorted(document, np.arange(len(rows) + 1))
        parts["part"] = np.arange(len(document)) - offsets[document]
        parts["is_last"][offsets[1:][np.diff(offsets) > 0] - 1] = True
        total = np.bincount(document, weights=counts[:, POSITIONS], minlength=len(rows)).astype(np.int64)
        return ShuffleBlock(parts, counts, offsets, total, outcome)

    def _measure(self, shards: list[int]) -> list[tuple[SegmentTable, Measures]]:
        """Segments and measures of the shards; those far away are read at the same time."""
        new = [shard for shard in shards if shard not in self._measured]
        found = dict(self._measured)
        read = self._storage.map if local_path(self.shards[0]) is None else map
        for shard, table in zip(new, read(self._read, new), strict=True):
            found[shard] = table, measure_index(table, self.tokenizers, self.name)
        if len(self.shards) <= self._block_shards:  # a small source is walked often: its block is its epoch
            self._measured = found
        return [found[shard] for shard in shards]

    def _read(self, shard: int) -> SegmentTable:
        table = SegmentTable.read(self.shards[shard], self._storage, self._digests[shard])
        if len(table) != self.shard_rows[shard]:
            raise DataError(
                f"{self.shards[shard]}: its index has {len(table)} rows, source.json says {self.shard_rows[shard]}; "
                f"prepare {self.name} again"
            )
        return table

    def _cut_texts(
        self,
        documents: np.ndarray,
        measures: Measures,
        tables: tuple[SegmentTable, ...],
        borders: np.ndarray,
        rows: np.ndarray,
    ) -> "_Pieces":
        """Texts longer than a sequence, with their `measures`, cut where it is full."""
        room, tokens = self.limits.sequence_length - 2, measures.length - 2
        number = -(-tokens // room)
        text, tokens = np.repeat(np.arange(len(documents)), number), np.repeat(tokens, number)
        first = (np.arange(len(text)) - np.repeat(np.cumsum(number) - number, number)) * room
        last = np.minimum(first + room, tokens)
        ends = last == tokens  # only there stands eos
        targets = last - first
        partly = measures.labels[:, Modality.TEXT] < measures.length - 2  # some of their tokens are given
        for shard, table in enumerate(tables) if partly.any() else ():
            place = rows[documents[text]]
            here = np.flatnonzero(partly[text] & (borders[shard] <= place) & (place < borders[shard + 1]))
            own = place[here] - borders[shard]
            targets[here] = targets_before(table, own, last[here]) - targets_before(table, own, first[here])
        counts = np.zeros((len(text), columns()), np.int64)
        counts[:, POSITIONS] = last - first + 1 + ends
        counts[:, COST] = counts[:, POSITIONS] ** 2
        counts[:, labels().start + Modality.STRUCTURE] = ends & (measures.labels[text, Modality.STRUCTURE] > 0)
        counts[:, labels().start + Modality.TEXT] = targets
        return _Pieces(documents[text], first, last, counts)

    def _cut_clips(
        self,
        documents: np.ndarray,
        tables: tuple[SegmentTable, ...],
        borders: np.ndarray,
        rows: np.ndarray,
        isolated: np.ndarray,
    ) -> tuple["_Pieces", np.ndarray]:
        """Clips longer than a sequence, cut at the last slice that fits: all of them at once, part by part.

        Also the documents of which a single slice is too long: the first shard's stop the run at its start, one that
        turns up after weeks is dropped and counted.
        """
        place = rows[documents]
        order = np.argsort(place, kind="stable")  # as they stand in the tables
        documents, place = documents[order], place[order]
        own = np.split(place, np.searchsorted(place, borders[1:-1]))
        found = [
            measure_slices(table, chosen - start, self.tokenizers, self.name)
            for table, chosen, start in zip(tables, own, borders[:-1], strict=True)
            if len(chosen)
        ]
        each = Measures.concatenate([measures for measures, _ in found])
        slices = np.concatenate([number for _, number in found])
        ends = np.cumsum(slices)
        alone = np.repeat(isolated[documents], slices)
        counts = _counts(each, alone)
        over = (counts[:, POSITIONS] > self.limits.sequence_length) | (
            counts[:, PATCHES] > self.limits.patches_per_sequence
        )
        unusable = np.add.reduceat(over, ends - slices) > 0
        counts[:, POSITIONS] -= 4  # bos, video_start, video_end, eos: once a part
        upto = np.vstack([zeros(), np.cumsum(counts, axis=0)])
        positions, patches = upto[:, POSITIONS].copy(), upto[:, PATCHES].copy()
        room, patch_room = self.limits.sequence_length - 4, self.limits.patches_per_sequence

        start, pieces = ends - slices, [_Pieces.none()]
        active = np.flatnonzero(~unusable)
        while len(active):
            begin = start[active]
            stop = np.minimum(
                np.searchsorted(positions, positions[begin] + room, side="right"),
                np.searchsorted(patches, patches[begin] + patch_room, side="right"),
            )
            stop = np.minimum(stop - 1, ends[active])
            part = upto[stop] - upto[begin]
            part[:, POSITIONS] += 4
            # Squares of lengths do not add up over slices; a part's texts are few beside its images.
            part[:, COST] = part[:, POSITIONS] ** 2
            first = ends[active] - slices[active]
            pieces.append(_Pieces(documents[active], begin - first, stop - first, part))
            start[active] = stop
            active = active[stop < ends[active]]
        return _Pieces.join(pieces), documents[unusable]

    def check_slices(self) -> None:
        """Raise ConfigError where a slice of the first shard is longer than a sequence: no cut could help."""
        table = self._read(0)
        each, _ = measure_slices(table, np.arange(len(table)), self.tokenizers, self.name)
        length, patches = int(each.isolated.max(initial=0)), int(each.count("patches").max(initial=0))
        if length > self.limits.sequence_length or patches > self.limits.patches_per_sequence:
            raise ConfigError(
                f"source {self.name}: a time slice takes {length} positions and {patches} patches, but "
                f"data.sequence_length is {self.limits.sequence_length} and data.patches_per_sequence "
                f"{self.limits.patches_per_sequence}; a slice is never split: raise them, or lower "
                "tokenizers.vision.max_patches, the number of cameras or the audio codec's rate"
            )


@dataclass(frozen=True)
class _Pieces:
    """Parts as columns: the document each belongs to, its units and its counts."""

    document: np.ndarray
    first: np.ndarray
    last: np.ndarray
    counts: np.ndarray

    @staticmethod
    def none() -> "_Pieces":
        empty = np.zeros(0, np.int64)
        return _Pieces(empty, empty, empty, np.zeros((0, columns()), np.int64))

    @staticmethod
    def join(pieces: list["_Pieces"]) -> "_Pieces":
        return _Pieces(*(np.concatenate([getattr(p, f.name) for p in pieces]) for f in fields(_Pieces)))


def _counts(measures: Measures, isolated: np.ndarray) -> np.ndarray:
    """Count documents that are in one piece: [documents, columns]."""
    counts = np.empty((len(isolated), columns()), np.int64)
    length = np.where(isolated, measures.isolated, measures.length)
    counts[:, POSITIONS] = length
    counts[:, PAIRS] = np.where(isolated, measures.pairs, 0)
    counts[:, count_columns()] = measures.counted
    counts[:, COST] = np.where(isolated, measures.isolated_cost, length**2)
    counts[:, labels()] = np.where(isolated[:, None], measures.isolated_labels, measures.labels)
    return counts


def rng(seed: int, *counters: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its key; counters may be -1."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *(c + 1 for c in counters)])))


def units(seed: int, source: int, counter: int, number: int) -> np.ndarray:
    """Return keyed numbers in [0, 1) for the documents `counter`.. of a source: SplitMix64 over the key."""
    key = np.full(number, seed, np.uint64)
    counters = np.arange(counter + 1, counter + 1 + number, dtype=np.uint64)
    for value in (np.uint64(source + 1), counters):
        key = mixed_u64((key ^ value) * np.uint64(INCREMENT))
    return (key >> np.uint64(11)) / 2.0**53
