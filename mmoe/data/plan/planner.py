"""Plan which documents go into which sequence, as a pure function of ``(seed, counters)``.

A window takes documents one by one from the source furthest behind its share of the positions, is packed on its own
by best fit, and its sequences are shuffled. So the state is a window number, the next sequence in it, and a few
numbers a source; restoring it packs one window and replays nothing. The window's shares are in it, since those of a
run that was made longer may be others: a window that is begun ends as it was planned. A window ends early where a stage
does: the sequences before a stage's border come from that stage, the ones behind it from the next, whatever the batch
size.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mmoe.data.plan.blocks import FITS, OUTCOMES, PlannedSource, SequenceBudget, ShuffleBlock, rng
from mmoe.data.plan.mixture import Mixture
from mmoe.data.plan.packing import best_fit
from mmoe.errors import ConfigError
from mmoe.schema.counts import PATCHES, POSITIONS, Counts

_SPARE = 16  # documents read ahead of the estimate of what a window takes from a source


class DocumentRef(NamedTuple):
    """Names a document part: units `first`..`last` of a row (text tokens, or slices, or 0..1 for the whole)."""

    source: int
    shard: int
    row: int
    part: int
    first: int
    last: int
    isolated: bool
    is_last: bool  # the part that ends the document


class SequencePlan(NamedTuple):
    """Lists the document parts of sequence `number` of the run in order, `PART_DTYPE` [n]."""

    number: int
    parts: np.ndarray
    counts: Counts

    @property
    def documents(self) -> list[DocumentRef]:
        """The document parts one by one, as they are decoded."""
        return [DocumentRef(*part[:-1]) for part in self.parts.tolist()]


@dataclass
class PlanState:
    """Says where the plan stands; all but `next_sequence` is as it was when the window began.

    `drawn` documents and `served` positions by source; `deficit` is what its planned positions are ahead of those.
    `lost` counts the documents that were cut or dropped, by "source / reason". `shares` by source are what the window
    was planned with; None before it is, and in checkpoints of earlier versions.
    """

    window: int = 0
    next_sequence: int = 0
    sequences: int = 0  # of all windows before this one
    drawn: list[int] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    deficit: list[int] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    shares: list[float] | None = None

    def copy(self) -> "PlanState":
        """Copy the state with its lists and counts."""
        return PlanState(**asdict(self))


class Planner:
    """Plans the sequences of a run over several sources, without end."""

    def __init__(
        self, sources: list[PlannedSource], mixture: Mixture, limits: SequenceBudget, window_documents: int
    ) -> None:
        self.sources, self.mixture, self.limits, self.window_documents = sources, mixture, limits, window_documents
        none = [0] * len(sources)
        self._state = PlanState(drawn=none, served=none.copy(), deficit=none.copy())
        self._sequences: list[SequencePlan] = []
        self._after: PlanState | None = None
        for source in sources:  # what the first shard shows to be impossible stops the run at its start
            source.check_slices()

    @property
    def state(self) -> dict[str, Any]:
        """The place where the plan stands, as a checkpoint holds it."""
        return asdict(self._state)

    @property
    def lost(self) -> dict[str, int]:
        """The number of documents cut or dropped up to the end of the present window, by "source / reason"."""
        return dict((self._after or self._state).lost)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`.

        Raises ConfigError where it is of another number of sources.
        """
        if len(state["drawn"]) != len(self.sources):
            raise ConfigError(
                f"the checkpoint's stream has {len(state['drawn'])} sources, the config {len(self.sources)}; "
                "resume with the data.sources of the run"
            )
        self._state, self._after = PlanState(**state).copy(), None

    def next_sequence(self) -> SequencePlan:
        """Plan the next sequence; plans another window where this one is used up."""
        if self._after is None:
            self._sequences, self._after = self._plan_window(self._state)
        since = self._after.drawn if self._sequences else self._state.drawn
        while self._state.next_sequence >= len(self._sequences):
            self._refuse_empty(np.array(self._after.drawn) - since)
            self._state = self._after
            self._sequences, self._after = self._plan_window(self._state)
        sequence = self._sequences[self._state.next_sequence]
        self._state.next_sequence += 1
        return sequence

    def _plan_window(self, start: PlanState) -> tuple[list[SequencePlan], PlanState]:
        length = self.limits.sequence_length
        position = start.sequences * length
        stage = self.mixture.stage(position)
        if start.shares is None:
            start.shares = self.mixture.shares(position).tolist()
        shares = np.array(start.shares)
        most = np.inf  # sequences up to the stage's border
        if stage is not self.mixture.stages[-1]:
            most = -(-(stage.stop - position) // length)
        room = most * length
        while True:
            after, parts, counts = self._take(start, shares, room)
            sequences = pack(parts, counts, self.limits, rng(self.limits.seed, -1, start.window), start.sequences)
            if len(sequences) <= most or sum(after.drawn) - sum(start.drawn) == 1:
                break
            room = counts[:, POSITIONS].sum() - length // 8  # not every position is filled: a little less fits
        after.sequences += len(sequences)
        return sequences, after

    def _take(self, start: PlanState, shares: np.ndarray, room: float) -> tuple[PlanState, np.ndarray, np.ndarray]:
        """The documents of a window as parts and counts, and the state behind them, but for its sequences."""
        taken = self._draw(start, shares, room)
        parts, counts, lost = [], [], Counter(start.lost)
        drawn, served = list(start.drawn), np.zeros(len(self.sources), np.int64)
        for number, spans in enumerate(taken):
            for block, first, last in spans:
                rows = slice(block.offsets[first], block.offsets[last])
                parts.append(block.parts[rows])
                counts.append(block.counts[rows])
                drawn[number] += last - first
                served[number] += int(block.lengths[first:last].sum())
                for outcome in np.flatnonzero(np.bincount(block.outcome[first:last])).tolist():
                    if outcome != FITS:
                        reason = f"{self.sources[number].name} / {OUTCOMES[outcome]}"
                        lost[reason] += int((block.outcome[first:last] == outcome).sum())
        planned = np.rint(shares * served.sum()).astype(np.int64)
        after = PlanState(
            window=start.window + 1,
            sequences=start.sequences,
            drawn=drawn,
            served=(np.array(start.served) + served).tolist(),
            deficit=(np.array(start.deficit) + planned - served).tolist(),
            lost=dict(lost),
        )
        return after, np.concatenate(parts), np.concatenate(counts)

    def _draw(self, start: PlanState, shares: np.ndarray, room: float) -> list[list[tuple[ShuffleBlock, int, int]]]:
        """The documents of a window as spans of blocks, by source; no more positions than `room`, but one document.

        Taking the next document from the source furthest behind its share is a merge of the sources by
        (positions served - deficit) / share before each document, so a sort finds the same documents at once.
        """
        active = np.flatnonzero(shares > 0)
        documents = shares[active] / np.array([self.sources[i].mean_length for i in active])
        wanted = (1.2 * self.window_documents * documents / documents.sum()).astype(np.int64) + _SPARE
        while True:
            spans = [self._upcoming(int(i), start.drawn[i], int(n)) for i, n in zip(active, wanted, strict=True)]
            lengths = [np.concatenate([block.lengths[a:b] for block, a, b in found]) for found in spans]
            keys = [
                (np.cumsum(each) - each - start.deficit[i]) / shares[i] for i, each in zip(active, lengths, strict=True)
            ]
            owner = np.repeat(np.arange(len(active)), [len(each) for each in lengths])
            order = np.argsort(np.concatenate(keys), kind="stable")[: self.window_documents]
            upto = np.cumsum(np.concatenate(lengths)[order])
            order = order[: max(1, int(np.searchsorted(upto, room, side="right")))]
            number = np.bincount(owner[order], minlength=len(active))
            short = number == wanted  # the next document of these might come first, were it known
            if not short.any():
                break
            wanted = np.where(short, 2 * wanted, wanted)
        taken: list[list[tuple[ShuffleBlock, int, int]]] = [[] for _ in self.sources]
        for i, found, left in zip(active.tolist(), spans, number.tolist(), strict=True):
            for block, first, last in found:
                if left > 0:
                    taken[i].append((block, first, min(last, first + left)))
                left -= last - first
        return taken

    def _upcoming(self, number: int, counter: int, documents: int) -> list[tuple[ShuffleBlock, int, int]]:
        """The next documents of a source, as spans of its blocks."""
        spans = []
        while documents > 0:
            block, first = self.sources[number].at(counter)
            last = min(first + documents, len(block))
            spans.append((block, first, last))
            documents -= last - first
            counter += last - first
        return spans

    def _refuse_empty(self, drawn: np.ndarray) -> None:
        """Raises ConfigError where a source gave `drawn` [sources] documents on end and none of them fits."""
        for source, number in zip(self.sources, drawn.tolist(), strict=True):
            if number > source.rows:
                raise ConfigError(
                    f"no document of source {source.name} fits data.sequence_length {self.limits.sequence_length}; "
                    "raise it"
                )


def plan_once(
    sources: list[PlannedSource], limits: SequenceBudget, most_documents: int | None = None
) -> list[SequencePlan]:
    """Plan every document of every source exactly once, packed as one window and left in packing order.

    `most_documents`: of a source that has more, a seeded choice of so many.
    """
    blocks = []
    for source in sources:
        chosen = np.arange(source.rows)
        if most_documents is not None and source.rows > most_documents:
            chosen = np.sort(rng(limits.seed, source.number).choice(chosen, most_documents, replace=False))
        ends = np.cumsum(source.shard_rows)
        for shard, rows in enumerate(np.split(chosen, np.searchsorted(chosen, ends[:-1]))):
            if len(rows):
                blocks.append(source.once(shard, rows - (ends[shard] - source.shard_rows[shard]), int(rows[0])))
    parts, counts = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("parts", "counts"))
    return pack(parts, counts, limits, None, 0)


def pack(
    parts: np.ndarray, counts: np.ndarray, limits: SequenceBudget, generator: np.random.Generator | None, first: int
) -> list[SequencePlan]:
    """Pack `parts` [n] with their `counts` [n, columns] into sequences, numbered from `first`.

    `generator` shuffles the sequences and the parts inside each: packing sorts both by length, and under a capacity
    the last positions of a sequence are the ones whose tokens are dropped.
    """
    if not len(parts):
        return []
    bins = best_fit(counts[:, POSITIONS], counts[:, PATCHES], limits.sequence_length, limits.patches_per_sequence)
    if generator is None:
        items = np.argsort(bins, kind="stable")
    else:
        bins = generator.permutation(int(bins.max()) + 1)[bins]
        items = np.lexsort((generator.random(len(bins)), bins))
    sizes = np.bincount(bins)
    ends = np.cumsum(sizes)
    totals = np.add.reduceat(counts[items], ends - sizes, axis=0)
    parts = parts[items]
    return [
        SequencePlan(first + i, parts[end - size : end], Counts(total))
        for i, (end, size, total) in enumerate(zip(ends.tolist(), sizes.tolist(), totals))
    ]
