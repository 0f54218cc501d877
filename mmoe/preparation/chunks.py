"""Makes chunks, the units of work of a preparation: a run of items becomes checked, filtered samples in shards.

A chunk is a folder with its shards, `record.json` (counts, what was refused and removed) and `arrays.npz` (hashes,
signatures, statistics). It is written under another name and renamed when it is whole, so what can be seen is
finished, by whomever: a worker process, a Ray task, or an earlier attempt at the same job.
"""

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import ShardWriter, read_stored
from mmoe.data.load.tables import load_array
from mmoe.data.load.video import VideoBackend
from mmoe.preparation.filters import FilterConfig, find_fault
from mmoe.preparation.rows import Row, make_row
from mmoe.preparation.signatures import DedupConfig, SignatureBuilder, Signatures
from mmoe.preparation.source_report import SplitReport
from mmoe.preparation.sources.base import Item, Refused
from mmoe.schema.bounds import Bounds, bounded_by
from mmoe.schema.channels import AudioChannel, hearing
from mmoe.schema.manifest import ShardEntry
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_SLICE, Sample
from mmoe.tokenizers.text import TextTokenizer

_TABLES = (Modality.INERTIAL, Modality.STATE, Modality.ACTION)


class ChunkConfig(Config):
    """Says how chunks are made.

    It is kept apart from what else preparation decides, so that the processes that make chunks need no torch.
    """

    shard_bytes: int = Field(256 << 20, gt=0)  # of one shard, about
    shard_rows: int = Field(10_000, gt=0)  # most samples of one shard
    video_backend: VideoBackend = "auto"  # decord: stored videos it is proven to read, the others are refused
    audio_channel: AudioChannel = "mix"  # heard of audio with several: their mean, left, right, or a number from 0
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    bounds: Bounds = Bounds()  # of what is read of one file


@dataclass(frozen=True, eq=False)
class Chunk:
    """Items that are prepared together: the `number`-th run of the items of `side`."""

    side: str
    number: int
    items: Sequence[Item] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the chunk's folder."""
        return f"{self.side}-{self.number:06d}"


def cut_chunks(side: str, items: Sequence[Item], length: int) -> list[Chunk]:
    """Cut the items of a side into chunks of at most `length` items, as even as they can be."""
    count = -(-len(items) // length)
    ends = [len(items) * number // count for number in range(count + 1)] if count else []
    return [Chunk(side, number, items[start:stop]) for number, (start, stop) in enumerate(pairwise(ends))]


@dataclass(frozen=True)
class StoredChunk:
    """Reads the files of a finished chunk on disk when they are asked for."""

    folder: Path

    @cached_property
    def record(self) -> dict:
        """The content of ``record.json``: counts, shards, and what was refused and removed."""
        return json.loads((self.folder / "record.json").read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of ``arrays.npz``, by name."""
        with np.load(self.folder / "arrays.npz", allow_pickle=False) as stored:
            return dict(stored)

    def whole(self) -> bool:
        """Tell whether the chunk is finished and its files are as written: a crash of the machine may cut them."""
        try:
            sizes = [(self.folder / shard.path).stat().st_size == shard.bytes for shard in self.shards]
            return all(sizes) and bool(self.arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    @property
    def shards(self) -> list[ShardEntry]:
        """The entries of the chunk's shards, with paths relative to its folder."""
        return [ShardEntry(**shard) for shard in self.record["shards"]]

    @property
    def refused(self) -> list[tuple[int, str, str]]:
        """The items that could not be read, as (item, reason, message)."""
        return [tuple(line) for line in self.record["refused"]]

    @property
    def removed(self) -> list[tuple[int, str, str]]:
        """The items that a filter took out, as (item, reason, message)."""
        return [tuple(line) for line in self.record["removed"]]

    def report(self) -> SplitReport:
        """Read the counts that the samples of the chunk add up to."""
        return SplitReport.load(self.record["report"], self.arrays)

    def signatures(self) -> Signatures:
        """Read the hashes and signatures that duplicates are found by."""
        with np.load(self.folder / "arrays.npz", allow_pickle=False) as stored:  # of these only: the rest is larger
            return Signatures(**{field.name: stored[field.name] for field in fields(Signatures)})

    def rows(self) -> Iterator[Row]:
        """Yield the samples as they were written, without the segments of the reader."""
        sizes, contents = self.arrays["text_bytes"].tolist(), self.arrays["content"].tolist()
        flags, number = self.record["flags"], 0
        for shard in self.shards:
            index = ShardIndex.read(self.folder / shard.path)
            for at in range(len(index)):
                yield _stored_row(index, at, contents[number], sizes[number], Counter(flags.get(str(number), {})))
                number += 1


@dataclass(frozen=True)
class ChunkMaker:
    """Makes chunks: a call writes the folder ``<chunk.name>`` in `folder`, and returns the number of its items.

    It is picklable: the work of an engine.
    """

    folder: Path
    config: ChunkConfig
    tokenizer: TextTokenizer
    vector_names: dict[str, tuple[str, ...]]
    audio_rate: int | None = None  # Hz, of the codec that is to be fitted
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, chunk: Chunk) -> int:
        """Write the folder of the chunk, and return the number of its items."""
        refused, removed = [], []
        with bounded_by(self.config.bounds), _Writer(self.folder / chunk.name, self.config) as writer:
            for number, item in enumerate(chunk.items):
                row = self.row(item)
                if isinstance(row, Refused):
                    refused.append((number, row.reason, str(row)))
                elif fault := find_fault(_texts(row), _sizes(row), self.config.filters):
                    removed.append((number, fault.reason, f"sample {item.key} {fault.said}"))
                else:
                    writer.add(row, number)
            writer.finish(refused, removed)
        return len(chunk.items)

    def row(self, item: Item) -> Row | Refused:
        """Make the sample of an item and check it; what is wrong with it is returned, not raised."""
        backend = self.config.video_backend
        with hearing(self.config.audio_channel):
            return make_row(item, self.tokenizer, backend, self.vector_names, self.audio_rate, self.categories)


@dataclass(frozen=True)
class ChunkDuplicates:
    """Names a finished chunk and those of its `items` (numbers) that turned out to be duplicates."""

    name: str
    items: frozenset[int]


@dataclass(frozen=True)
class DuplicateRemover:
    """Writes chunks again without their duplicates, from their shards in `source`, into `folder`.

    A call returns the number of samples left out.
    """

    source: Path
    folder: Path
    config: ChunkConfig

    def __call__(self, chunk: ChunkDuplicates) -> int:
        """Write the folder of the samples that are left, and return the number of those left out."""
        stored = StoredChunk(self.source / chunk.name)
        config = self.config.model_copy(update={"dedup": DedupConfig()})  # what is left has been compared
        with _Writer(self.folder / chunk.name, config) as writer:
            for item, row in zip(stored.arrays["item"].tolist(), stored.rows(), strict=True):
                if item not in chunk.items:
                    writer.add(row, item)
            writer.finish(stored.refused, stored.removed)
        return len(chunk.items)


class _Writer:
    """Writes the folder of a chunk under a name of its own, which `finish` changes to `folder`."""

    def __init__(self, folder: Path, config: ChunkConfig) -> None:
        self._folder = folder
        self._temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
        self._shards = ShardWriter(self._temporary, config.shard_bytes, config.shard_rows)
        self._report, self._signatures = SplitReport(), SignatureBuilder(config.dedup)
        self._text_bytes: list[int] = []
        self._flags: dict[int, Counter[str]] = {}

    def add(self, row: Row, item: int) -> None:
        if row.sample.flags:
            self._flags[len(self._text_bytes)] = row.sample.flags
        self._text_bytes.append(row.text_bytes)
        self._report.add(row)
        self._signatures.add(
            item,
            row.content_hash,
            row.segments,
            list(row.sample.members),
            lambda: _texts(row),
            row.sample.members.__getitem__,
        )
        row.write(self._shards)

    def finish(self, refused: list[tuple[int, str, str]], removed: list[tuple[int, str, str]]) -> None:
        self._shards.__exit__(None)
        record = {
            "report": self._report.as_dict(),
            "refused": refused,
            "removed": removed,
            "flags": self._flags,
            "shards": [s.model_copy(update={"path": Path(s.path).name}).model_dump() for s in self._shards.shards],
        }
        arrays = {"text_bytes": np.array(self._text_bytes, np.int64), **self._report.arrays()}
        arrays |= self._signatures.build().arrays()
        np.savez(self._temporary / "arrays.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs: as its flag
        text = json.dumps(record)  # ASCII: file names may hold what is no UTF-8
        (self._temporary / "record.json").write_text(text, encoding="ascii")
        if self._folder.exists():  # half of one, or finished by somebody who was thought dead
            shutil.rmtree(self._folder)
        # Not synced, as a file by `write_atomically` is: what a crash of the machine cuts, `StoredChunk.whole` finds.
        self._temporary.rename(self._folder)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._shards.__exit__(kind)
            shutil.rmtree(self._temporary, ignore_errors=True)


def _texts(row: Row) -> list[str]:
    return [segment.text for segment in row.sample.segments if segment.modality is Modality.TEXT]


def _sizes(row: Row) -> list[tuple[int, int]]:
    """Height and width of the still images."""
    images = (s for s in row.sample.segments if s.modality is Modality.VISION and s.slice == NO_SLICE)
    return [(image.height, image.width) for image in images]


def _stored_row(index: ShardIndex, at: int, content_hash: int, text_bytes: int, flags: Counter[str]) -> Row:
    segments, members = index.row_segments(at), {}
    for number in range(index.row_members(at)):
        stored = read_stored(index, at, number)
        members[stored.name] = stored.content
    names = list(members)
    proven = frozenset(name for number, name in enumerate(names) if index.row_decord(at, number))
    vectors: dict[Modality, list[np.ndarray]] = {}
    payloads = zip(segments["modality"].tolist(), segments["member"].tolist())
    for kind, number in dict.fromkeys(p for p in payloads if p[0] in _TABLES):
        table = load_array(members[names[number]], f"{index.keys[at]}.{names[number]}")
        vectors.setdefault(Modality(kind), []).append(table.astype(np.float32))
    return Row(
        sample=Sample(index.keys[at], index.recordings[at], members, flags=flags),
        content_hash=content_hash,
        text_ids=index.row_text(at),
        segments=segments,
        text_bytes=text_bytes,
        vectors=vectors,
        decord=proven,
    )
