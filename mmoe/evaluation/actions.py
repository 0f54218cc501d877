"""Measures action errors beside baselines that do not look: every chunk of a split, with targets and predictions.

Shape suffixes: M chunks, m chunks of a batch, H steps of a chunk, A action dimensions (the union over sources).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_stored
from mmoe.data.load.tables import load_array
from mmoe.data.plan.prepared import PreparedSources
from mmoe.data.storage.store import Storage
from mmoe.evaluation.inference import Inference
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import Modality
from mmoe.tokenizers.actions import ActionTokenizer
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.training.run import Run

Key = tuple[int, int, int, int]  # source, shard, row, and number of the chunk in its row


@dataclass(frozen=True)
class Chunks:
    """Holds the action chunks of a split as they were logged, in normalized units, ordered by key.

    `target`, `mask` [M, H, A]; `last` [M, A] the action logged last before the reference, where `has_last` [M];
    `source` [M] numbers; `time_ns` [M] of the first step in clip time; `recording` names by chunk.
    """

    keys: list[Key]
    target: np.ndarray
    mask: np.ndarray
    last: np.ndarray
    has_last: np.ndarray
    source: np.ndarray
    time_ns: np.ndarray
    recording: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, at: np.ndarray) -> "Chunks":
        """Return the chunks with the numbers `at`, in this order."""
        return Chunks(
            [self.keys[i] for i in at],
            self.target[at],
            self.mask[at],
            self.last[at],
            self.has_last[at],
            self.source[at],
            self.time_ns[at],
            [self.recording[i] for i in at],
        )


@dataclass(frozen=True)
class LoggedChunk:
    """Holds an action chunk as it was logged: its segment, `rows` [H, A] in the source's units, which are `inside`.

    `named` [H, C] are the numbers of named values, -1 where the recording has ended. `before` [1, A] is the row logged
    before the first one, None where there is none; `time_ns` is clip time.
    """

    segment: np.void
    rows: np.ndarray
    inside: np.ndarray
    named: np.ndarray
    before: np.ndarray | None
    time_ns: int


def row_chunks(index: ShardIndex, row: int, tokenizer: ActionTokenizer, storage: Storage) -> Iterator[LoggedChunk]:
    """Read the action chunks of one row of a shard, in order."""
    segments = index.row_segments(row)
    actions = segments[segments["modality"] == Modality.ACTION]
    tables = {member: _table(storage, index, row, member) for member in set(actions["member"].tolist())}
    for segment in actions:
        table, start = tables[int(segment["member"])], int(segment["start"])
        place = table, start, int(segment["stop"])
        rows, inside = tokenizer.chunk_of(*place)
        named = tokenizer.categories_of(*place)
        before = table[start - 1 : start, tokenizer.columns] if start > 0 else None
        time_ns = int(segment["timestamp_ns"] + segment["offset_ns"])
        yield LoggedChunk(segment, rows, inside, named, before, time_ns)


def read_chunks(sources: PreparedSources, tokenizers: Tokenizers, split: str) -> Chunks:
    """Read every chunk of a split from the action tables alone; no image or audio is opened."""
    dims, chunk = tokenizers.dims[Modality.ACTION], tokenizers.config.action.chunk
    keys, recording, parts = [], [], []
    for number, files in enumerate(sources.files(split)):
        if files.name not in tokenizers.actions:
            continue
        tokenizer, columns = tokenizers.actions[files.name], dims.columns[files.name]
        for shard, tar in enumerate(files.tars):
            index = ShardIndex.read(tar, sources.storage)
            for row in range(len(index)):
                for count, logged in enumerate(row_chunks(index, row, tokenizer, sources.storage)):
                    target, mask = np.zeros((chunk, dims.size)), np.zeros((chunk, dims.size), bool)
                    target[:, columns], mask[:, columns] = tokenizer.normalize(logged.rows), logged.inside
                    last = np.zeros(dims.size)
                    if logged.before is not None:
                        last[columns] = tokenizer.normalize(logged.before)[0]
                    keys.append((number, shard, row, count))
                    recording.append(index.recordings[row])
                    known = logged.before is not None
                    parts.append((np.where(mask, target, 0.0), mask, last, known, number, logged.time_ns))
    shape = (0, chunk, dims.size)
    if not parts:
        empty = np.zeros(0, np.int64)
        return Chunks([], np.zeros(shape), np.zeros(shape, bool), np.zeros(shape[::2]), empty > 0, empty, empty, [])
    targets, masks, lasts, has_last, source, times = (np.array(column) for column in zip(*parts))
    return Chunks(keys, targets, masks, lasts, has_last, source, times, recording)


def chunk_starts(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Find the flat position [m] of the first `action` token of each chunk of a batch, and its document part [m, 4]."""
    length = batch.shape[1]
    action = (batch.modality == Modality.ACTION).flatten().cpu().numpy()
    starts = np.flatnonzero(action & ~np.r_[False, action[:-1]])  # `action_end` parts one chunk from the next
    documents = batch.document.flatten().cpu().numpy()[starts]
    parts = [batch.documents[at // length][number] for at, number in zip(starts.tolist(), documents.tolist())]
    return starts, np.array(parts, np.int64).reshape(-1, 4)


def predict_actions(
    model: Inference, hidden: Tensor, batch: PackedBatch, starts: np.ndarray, parts: np.ndarray
) -> np.ndarray:
    """Predict the chunks [m, H, A] of a batch in normalized units.

    They are predicted at the `action` tokens with the flat positions `starts` [m] of the document parts `parts` [m, 4],
    from the hidden states `hidden` [B, L, D]. A discrete action is the likeliest bin of each element.
    """
    states = hidden.flatten(0, 1)
    if not model.run.tokenizers.discrete_actions:
        return model.model.actions(states[batch.action_index]).double().cpu().numpy()
    bins = model.run.tokenizers.vocabulary.ranges["action"]

    def likeliest(start: int, stop: int) -> np.ndarray:
        return model.logits(states[start:stop])[:, bins.start : bins.stop].argmax(1).cpu().numpy()

    return _from_bins(model.run, starts, parts, likeliest)[0]


def logged_actions(run: Run, batch: PackedBatch, starts: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return target and mask [m, H, A] of the chunks of a batch, in normalized units.

    `starts` [m] and `parts` [m, 4] are those of `chunk_starts`. A discrete action has the values of its bins.
    """
    if not run.tokenizers.discrete_actions:
        return batch.action_target.double().cpu().numpy(), batch.action_mask.cpu().numpy()
    bins, labels = run.tokenizers.vocabulary.ranges["action"], batch.labels.flatten().cpu().numpy()
    return _from_bins(run, starts, parts, lambda start, stop: labels[start:stop] - bins.start)


def _from_bins(
    run: Run, starts: np.ndarray, parts: np.ndarray, bins: Callable[[int, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """[m, H, A] values of discrete chunks, and which of them there are: those whose bin is not negative."""
    dims, chunk = run.tokenizers.dims[Modality.ACTION], run.tokenizers.config.action.chunk
    values = np.zeros((len(starts), chunk, dims.size))
    there = np.zeros(values.shape, bool)
    for number, (start, part) in enumerate(zip(starts.tolist(), parts.tolist())):
        name = run.sources.names[part[0]]
        tokenizer, columns = run.tokenizers.actions[name], dims.columns[name]
        ids = bins(start, start + tokenizer.number_tokens).reshape(chunk, tokenizer.dims)
        values[number][:, columns] = tokenizer.normalize(tokenizer.decode(np.maximum(ids, 0)))
        there[number][:, columns] = ids >= 0
    return values, there


def align(parts: np.ndarray, values: np.ndarray, chunks: Chunks) -> np.ndarray:
    """Rearrange the `values` [m, ...] of the chunks of document parts to [M, ...], in the order of `chunks`.

    `parts` [m, 4] are in order within each part. A chunk that no part held (its row was too long and was left out) has
    NaN.
    """
    whole = np.full((len(chunks), *values.shape[1:]), np.nan)
    whole[places(parts, chunks)] = values
    return whole


def places(parts: np.ndarray, chunks: Chunks) -> np.ndarray:
    """Return the number in `chunks` of each chunk [m] of the document parts `parts` [m, 4]."""
    at = {key: number for number, key in enumerate(chunks.keys)}
    found = np.zeros(len(parts), np.int64)
    count, previous = 0, None
    for number in np.lexsort(parts.T[::-1]).tolist():  # stable: chunks of one part keep their order
        source, shard, row = parts[number, :3].tolist()
        count = count + 1 if (source, shard, row) == previous else 0
        previous = (source, shard, row)
        found[number] = at[source, shard, row, count]
    return found


def training_means(chunks: Chunks) -> np.ndarray:
    """Return the mean target by source, chunk step and dimension, [sources, H, A]; 0 where nothing was logged."""
    means = np.zeros((int(chunks.source.max(initial=-1)) + 1, *chunks.target.shape[1:]))
    for number in np.unique(chunks.source):
        mine = chunks.source == number
        count = chunks.mask[mine].sum(0)
        means[number] = chunks.target[mine].sum(0) / np.maximum(count, 1)
    return means


def hold_last(chunks: Chunks, means: np.ndarray) -> np.ndarray:
    """Predict [M, H, A] by holding the last logged action over all steps; the training mean where none was logged."""
    held = np.broadcast_to(chunks.last[:, None], chunks.target.shape)
    return np.where(chunks.has_last[:, None, None], held, means[chunks.source])


def error_tables(
    predictions: dict[str, np.ndarray], chunks: Chunks, names: tuple[str, ...], sources: list[str]
) -> dict[str, Any]:
    """Return the mean squared error an element, in normalized units, of each of `predictions` {who: [M, H, A]}.

    Keys: `all`, `by_source`, `by_dimension`, `by_source_and_dimension`, `by_step`; each leaf is {who: error}.
    Masked elements (padding, dimensions a source does not have) count nowhere.
    """
    squares = {who: np.where(chunks.mask, (p - chunks.target) ** 2, 0.0) for who, p in predictions.items()}

    def means(rows: Any = slice(None), steps: Any = slice(None), dims: Any = slice(None)) -> dict[str, float] | None:
        count = chunks.mask[rows][:, steps][:, :, dims].sum()
        if not count:
            return None
        table = {who: float(s[rows][:, steps][:, :, dims].sum() / count) for who, s in squares.items()}
        return table | {"elements": int(count)}

    by_source = {name: chunks.source == number for number, name in enumerate(sources)}
    by_source = {name: rows for name, rows in by_source.items() if rows.any()}
    return {
        "all": means(),
        "by_source": {name: means(rows) for name, rows in by_source.items()},
        "by_dimension": {name: means(dims=[a]) for a, name in enumerate(names) if chunks.mask[:, :, a].any()},
        "by_source_and_dimension": {
            source: {name: means(rows, dims=[a]) for a, name in enumerate(names) if chunks.mask[rows][:, :, a].any()}
            for source, rows in by_source.items()
        },
        "by_step": [means(steps=[h]) for h in range(chunks.target.shape[1])],
    }


def _table(storage: Storage, index: ShardIndex, row: int, member: int) -> np.ndarray:
    stored = read_stored(index, row, member, storage)
    return load_array(stored.content, stored.where)
