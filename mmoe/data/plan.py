"""The plan: which documents, in which sequence, as a pure function of ``(seed, counters)``.

Every source is walked epoch by epoch: a keyed permutation of its shards, cut into blocks, then a keyed
permutation of the rows of each block. A window takes documents one by one from the source furthest behind its
share of positions, is packed on its own by best fit, and its sequences are shuffled. So the state is a window
number, the next sequence in it, and two integers a source; restoring it packs one window and replays nothing.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data.index import ShardIndex, SourceManifest
from mmoe.data.measure import KINDS, Measures, measure_index, measure_slices
from mmoe.data.packing import best_fit
from mmoe.errors import ConfigError, DataError
from mmoe.tokenizers.bundle import Tokenizers


@dataclass(frozen=True)
class DocumentRef:
    """A document part: units `first`..`last` of a row (text tokens, or slices, or 0..1 for the whole)."""

    source: int
    shard: int
    row: int
    part: int
    first: int
    last: int
    isolated: bool
    is_last: bool  # the part that ends the document


@dataclass(frozen=True)
class Counts:
    """What a sequence or a step holds, known before anything is decoded."""

    positions: int  # that are not padding
    labels: np.ndarray  # [modalities] by modality of the target
    action_elements: int
    pairs: int
    patches: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.positions + other.positions,
            self.labels + other.labels,
            self.action_elements + other.action_elements,
            self.pairs + other.pairs,
            self.patches + other.patches,
        )

    @staticmethod
    def zero() -> "Counts":
        return Counts(0, np.zeros(KINDS, np.int64), 0, 0, 0)


@dataclass(frozen=True)
class SequencePlan:
    """One sequence: the document parts in it, in order."""

    documents: tuple[DocumentRef, ...]
    counts: Counts


@dataclass
class PlanState:
    """`window`, and `drawn` (documents) and `served` (positions) by source as they were when it began."""

    window: int
    next_sequence: int
    drawn: list[int]
    served: list[int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "next_sequence": self.next_sequence,
            "drawn": list(self.drawn),
            "served": list(self.served),
        }


@dataclass(frozen=True)
class PlanSettings:
    seed: int
    sequence_length: int
    patches_per_sequence: int
    window_documents: int
    isolated_pair_share: float
    block_shards: int = 16


class PlannedSource:
    """One split of a prepared source as an endless, keyed order of rows with their measures."""

    def __init__(self, number: int, name: str, folder: Path, manifest: SourceManifest, split: str, seed: int):
        if split not in manifest.splits or not manifest.splits[split].samples:
            raise DataError(f"{folder}/source.json: the split {split} is empty; prepare {name} from more recordings")
        self.number, self.name, self.folder, self.seed = number, name, folder, seed
        self.shards = [folder / shard.path for shard in manifest.splits[split].shards]
        self.shard_rows = np.array([shard.rows for shard in manifest.splits[split].shards])
        self.rows = int(self.shard_rows.sum())

    def positions(self, tokenizers: Tokenizers) -> int:
        """Positions of one epoch, every document in one piece."""
        measures = (measure_index(ShardIndex.read(shard), tokenizers, self.name) for shard in self.shards)
        return sum(int(m.length.sum()) for m in measures)

    def shard_order(self, epoch: int) -> np.ndarray:
        return _rng(self.seed, self.number, epoch).permutation(len(self.shards))


class Planner:
    """Plans sequences over several sources; `counts_lost` counts what was cut or dropped, by (source, reason)."""

    def __init__(
        self,
        sources: list[PlannedSource],
        shares: list[float],
        tokenizers: Tokenizers,
        settings: PlanSettings,
    ):
        self.sources, self.settings, self.tokenizers = sources, settings, tokenizers
        self.shares = np.array(shares)
        self.counts_lost: Counter[tuple[str, str]] = Counter()
        self._block = lru_cache(maxsize=2 * len(sources))(self._load_block)
        self._block_ends = lru_cache(maxsize=2 * len(sources))(self._find_block_ends)
        self._index = lru_cache(maxsize=4)(ShardIndex.read)
        self._window = PlanState(0, 0, [0] * len(sources), [0] * len(sources))
        self._sequences: list[SequencePlan] | None = None
        self._after: PlanState | None = None
        for source in sources:  # what the first shard shows to be impossible stops the run at its start
            self._measured(source, 0)
            index = self._index(str(source.shards[0]))
            self._refuse_long_slices(source, measure_slices(index, slice(0, len(index)), tokenizers, source.name))

    @property
    def state(self) -> PlanState:
        return PlanState(
            self._window.window,
            self._window.next_sequence,
            list(self._window.drawn),
            list(self._window.served),
        )

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["drawn"]) != len(self.sources):
            raise ConfigError(
                f"the checkpoint's stream has {len(state['drawn'])} sources, the config {len(self.sources)}; "
                "resume with the data.sources of the run"
            )
        self._window, self._sequences = PlanState(**state), None

    def next_sequence(self) -> SequencePlan:
        if self._sequences is None:
            self._sequences, self._after = self._pack_window(self._window)
        if self._window.next_sequence >= len(self._sequences):
            self._window = self._after
            self._sequences, self._after = self._pack_window(self._window)
        sequence = self._sequences[self._window.next_sequence]
        self._window.next_sequence += 1
        return sequence

    def once(self, most_documents: int | None = None) -> list[SequencePlan]:
        """Every document of every source exactly once, packed as one window and left in packing order.

        `most_documents`: of a source that has more, a seeded choice of so many.
        """
        parts = []
        for source in self.sources:
            chosen = np.arange(source.rows)
            if most_documents is not None and source.rows > most_documents:
                chosen = np.sort(_rng(self.settings.seed, source.number).choice(chosen, most_documents, replace=False))
            ends = np.cumsum(source.shard_rows)
            for shard, rows in enumerate(np.split(chosen, np.searchsorted(chosen, ends[:-1]))):
                measures = self._measured(source, shard)
                for row in (rows - ends[shard] + source.shard_rows[shard]).tolist():
                    parts += self._parts(source, shard, row, measures, row, counter=row)
        return self._pack(parts)

    def _pack_window(self, start: PlanState) -> tuple[list[SequencePlan], PlanState]:
        drawn, served = list(start.drawn), np.array(start.served, np.float64)
        parts: list[tuple[DocumentRef, int, Counts]] = []
        documents = 0
        with np.errstate(divide="ignore"):
            inverse = np.where(self.shares > 0, 1.0 / self.shares, np.inf)
        misses = 0
        while documents < self.settings.window_documents:
            behind = np.where(self.shares > 0, served * inverse, np.inf)
            number = int(np.argmin(behind))
            source = self.sources[number]
            counter = drawn[number]
            shards, rows, measures, at = self._at(source, counter)
            new = self._parts(source, int(shards[at]), int(rows[at]), measures, at, counter)
            drawn[number] += 1
            misses = 0 if new else misses + 1
            if misses > source.rows:
                raise ConfigError(
                    f"no document of source {source.name} fits data.sequence_length "
                    f"{self.settings.sequence_length}; raise it"
                )
            served[number] += sum(length for _, length, _ in new)
            parts += new
            documents += 1
        sequences = self._pack(parts)
        order = _rng(self.settings.seed, -1, start.window).permutation(len(sequences))
        after = PlanState(start.window + 1, 0, drawn, [int(s) for s in served])
        return [sequences[i] for i in order], after

    def _pack(self, parts: list[tuple[DocumentRef, int, Counts]]) -> list[SequencePlan]:
        bins = best_fit(
            np.array([length for _, length, _ in parts], np.int64),
            np.array([counts.patches for _, _, counts in parts], np.int64),
            self.settings.sequence_length,
            self.settings.patches_per_sequence,
        )
        return [
            SequencePlan(tuple(parts[i][0] for i in items), sum((parts[i][2] for i in items), Counts.zero()))
            for items in bins
        ]

    def _parts(
        self, source: PlannedSource, shard: int, row: int, measures: Measures, at: int, counter: int
    ) -> list[tuple[DocumentRef, int, Counts]]:
        """The document's parts with length and counts: one where it fits, several cut at slices or text tokens."""
        settings = self.settings
        isolated = bool(
            measures.pairs[at] and _unit(settings.seed, source.number, counter) < settings.isolated_pair_share
        )
        length = int((measures.isolated if isolated else measures.length)[at])
        fits = length <= settings.sequence_length and measures.patches[at] <= settings.patches_per_sequence
        if fits:
            last = max(1, int(measures.slices[at]))
            if measures.text_only[at]:
                last = length - 2
            ref = DocumentRef(source.number, shard, row, 0, 0, last, isolated, True)
            return [(ref, length, _counts(measures, at, isolated, length))]
        if measures.text_only[at]:
            self.counts_lost[source.name, "cut at a text token"] += 1
            return self._cut_text(source, shard, row, length - 2)
        if measures.slices[at]:
            self.counts_lost[source.name, "cut at a slice"] += 1
            return self._cut_slices(source, shard, row, isolated)
        self.counts_lost[source.name, "dropped: longer than a sequence"] += 1
        return []

    def _cut_text(self, source: PlannedSource, shard: int, row: int, tokens: int):
        room = self.settings.sequence_length - 2
        parts = []
        for part, first in enumerate(range(0, tokens, room)):
            last = min(first + room, tokens)
            end = last == tokens
            labels = np.zeros(KINDS, np.int64)
            labels[1], labels[0] = last - first, end  # TEXT, and the eos that ends the document
            length = last - first + 1 + end
            ref = DocumentRef(source.number, shard, row, part, first, last, False, end)
            parts.append((ref, length, Counts(length, labels, 0, 0, 0)))
        return parts

    def _cut_slices(self, source: PlannedSource, shard: int, row: int, isolated: bool):
        index = self._index(str(source.shards[shard]))
        each = measure_slices(index, slice(row, row + 1), self.tokenizers, source.name)
        self._refuse_long_slices(source, each)
        lengths = (each.isolated if isolated else each.length) - 4  # the clip's frame is counted once a part
        room, patch_room = self.settings.sequence_length - 4, self.settings.patches_per_sequence
        parts, first = [], 0
        while first < len(lengths):
            fit = np.cumsum(lengths[first:]) <= room
            fit &= np.cumsum(each.patches[first:]) <= patch_room
            last = first + int(fit.sum())
            chosen = np.arange(first, last)
            length = int(lengths[chosen].sum()) + 4
            labels = (each.isolated_labels if isolated else each.labels)[chosen].sum(0)
            counts = Counts(
                length,
                labels,
                int(each.action_elements[chosen].sum()),
                int(each.pairs[chosen].sum()) if isolated else 0,
                int(each.patches[chosen].sum()),
            )
            ref = DocumentRef(source.number, shard, row, len(parts), first, last, isolated, last == len(lengths))
            parts.append((ref, length, counts))
            first = last
        return parts

    def _refuse_long_slices(self, source: PlannedSource, each: Measures) -> None:
        length, patches = int(each.isolated.max(initial=0)), int(each.patches.max(initial=0))
        if length > self.settings.sequence_length or patches > self.settings.patches_per_sequence:
            raise ConfigError(
                f"source {source.name}: a time slice takes {length} positions and {patches} patches, but "
                f"data.sequence_length is {self.settings.sequence_length} and data.patches_per_sequence "
                f"{self.settings.patches_per_sequence}; a slice is never split: raise them, or lower "
                "tokenizers.vision.max_patches, the number of cameras or the audio codec's rate"
            )

    def _measured(self, source: PlannedSource, shard: int) -> Measures:
        index = self._index(str(source.shards[shard]))
        if len(index) != source.shard_rows[shard]:
            raise DataError(
                f"{source.shards[shard]}: its index has {len(index)} rows, source.json says "
                f"{source.shard_rows[shard]}; prepare {source.name} again"
            )
        return measure_index(index, self.tokenizers, source.name)

    def _at(self, source: PlannedSource, counter: int) -> tuple[np.ndarray, np.ndarray, Measures, int]:
        """Shards, rows and measures of the block that document number `counter` is drawn from, and its place there."""
        epoch, within = divmod(counter, source.rows)
        ends = self._block_ends(source.number, epoch)
        block = int(np.searchsorted(ends, within, side="right"))
        return *self._block(source.number, epoch, block), within - (int(ends[block - 1]) if block else 0)

    def _find_block_ends(self, number: int, epoch: int) -> np.ndarray:
        """Rows of the epoch before the end of each block of shards."""
        source = self.sources[number]
        rows = source.shard_rows[source.shard_order(epoch)]
        borders = np.append(np.arange(self.settings.block_shards, len(rows), self.settings.block_shards), len(rows))
        return np.cumsum(rows)[borders - 1]

    def _load_block(self, number: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, Measures]:
        """Shard, row and measures of a block's documents in their drawn order."""
        source = self.sources[number]
        size = self.settings.block_shards
        chosen = source.shard_order(epoch)[block * size : (block + 1) * size]
        measures = Measures.concatenate([self._measured(source, int(s)) for s in chosen])
        shards = np.repeat(chosen, source.shard_rows[chosen])
        rows = np.concatenate([np.arange(source.shard_rows[s]) for s in chosen])
        order = _rng(self.settings.seed, number, epoch, block).permutation(len(rows))
        return shards[order], rows[order], measures.take(order)


def _counts(measures: Measures, at: int, isolated: bool, length: int) -> Counts:
    labels = (measures.isolated_labels if isolated else measures.labels)[at]
    pairs = int(measures.pairs[at]) if isolated else 0
    return Counts(length, labels, int(measures.action_elements[at]), pairs, int(measures.patches[at]))


def _rng(seed: int, *counters: int) -> np.random.Generator:
    """A generator that depends on nothing but its key; counters may be -1."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *(c + 1 for c in counters)])))


def _unit(seed: int, *counters: int) -> float:
    """A keyed number in [0, 1): SplitMix64 over the counters, as a draw per document must be cheap."""
    x = seed
    for counter in counters:
        x = (x ^ (counter + 1)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x / 2.0**64
