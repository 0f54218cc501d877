"""The shard index and the source manifest: what is known of the data without opening a tar.

A prepared source is a folder::

    source.json                     SourceManifest
    train/shard-000000.tar          WebDataset shard
    train/shard-000000.parquet      its index: one row a sample
    heldout/...                     the same for the held-out recordings
    quarantine.jsonl                what was refused at preparation, with the reason
    removed.jsonl                   what can be read and was left out: filtered, or a duplicate

The parquet row holds the key, the recording, the byte range of every member in the tar (so that one member
is one range read), the token ids of the sample's text, and its segments (`SEGMENT_DTYPE`).
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mmoe.config.base import Config
from mmoe.data.index.check import check_members, check_segments
from mmoe.data.index.extent import MOST, SegmentGroup
from mmoe.data.index.file import read_table, write_table
from mmoe.data.storage.store import DEFAULT, Storage, join, local_path, with_suffix
from mmoe.errors import DataError, brief
from mmoe.schema.sample import SEGMENT_DTYPE

FORMAT = 3  # 2 had neither checksums of members nor the proof that decord may read them
MANIFEST = "source.json"
DIGEST = b"mmoe.digest"  # the key under which an index file holds its own
SPLITS = ("train", "heldout")
VECTORS = ("ACTION", "STATE", "INERTIAL")  # modalities whose payloads are rows of numbers
_MOST_ROWS = 10_000_000  # of a shard: an epoch is shuffled a block of shards at a time

# Of a segment, what its token count follows from.
PLANNED = ("modality", "slice", "camera", "start", "stop", "height", "width", "rate", "pair")
_PLANNED_DTYPE = np.dtype([(name, SEGMENT_DTYPE[name]) for name in PLANNED])
_SEGMENT_STRUCT = pa.struct([(name, pa.from_numpy_dtype(SEGMENT_DTYPE[name])) for name in SEGMENT_DTYPE.names])
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("recording", pa.string()),
        ("content_hash", pa.int64()),
        (
            "members",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("offset", pa.int64()),
                        ("size", pa.int64()),
                        ("crc32", pa.uint32()),  # of the content
                        ("decord", pa.bool_()),  # of a video: proven to give the frames that PyAV gives
                    ]
                )
            ),
        ),
        ("text_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(_SEGMENT_STRUCT)),
    ]
)


class VectorStats(Config):
    """Per-dimension statistics of an ACTION, STATE or INERTIAL stream over the training split.

    Values outside `low` to `high` are glitches: clipped when they are read, and not in mean and std. `clipped` counts
    those rows, by split and dimension: exact up to `statistics.RESERVOIR` rows, estimated above. Manifests written
    before there were such fences have none of the last five.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    period_ns: int = 0  # of the rows of an action table; 0 where rows have no fixed period
    quantiles: tuple[tuple[float, ...], ...] = ()  # by dimension, evenly spaced from the minimum to the maximum
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    minimum: tuple[float, ...] = ()  # of all rows of all splits, as float32: no row of the source is below it
    maximum: tuple[float, ...] = ()
    clipped: dict[str, tuple[int, ...]] = {}

    @model_validator(mode="after")
    def _one_value_a_name(self) -> "VectorStats":
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"the dimension name {repeated[0]} occurs twice among {', '.join(self.names)}")
        needed = {"mean", "std", "q01", "q99"}
        columns = {f: getattr(self, f) for f in (*sorted(needed), "quantiles", "low", "high", "minimum", "maximum")}
        columns |= {f"clipped.{split}": counts for split, counts in self.clipped.items()}
        for field, values in columns.items():
            if len(values) != len(self.names) and (values or field in needed):
                raise ValueError(f"{field} has {len(values)} values for {len(self.names)} dimensions")
        return self


class ShardEntry(Config):
    path: str  # of the tar, relative to the source folder; the index has the same stem
    rows: int = Field(ge=0, le=_MOST_ROWS)
    bytes: int = Field(ge=0, le=MOST)
    digest: str  # of all that its index says, the checksums of every member among it

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise ValueError(f"{brief(path)} is no path inside the source's folder")
        return path


class SplitEntry(Config):
    samples: int = Field(ge=0, le=MOST)
    recordings: int = Field(ge=0, le=MOST)
    shards: tuple[ShardEntry, ...]
    clips: int = Field(ge=0, le=MOST)  # samples made of time slices
    slices: int = Field(ge=0, le=MOST)
    groups: tuple[SegmentGroup, ...]
    flagged: dict[str, int] = {}  # "<stream>: <what>" -> members of slices; see `mmoe.preparation.slices`

    def segments(self, modality: str) -> int:
        """Number of segments of the modality of this name."""
        return sum(group.count for group in self.groups if group.modality == modality)


class _Format(BaseModel):
    """What every version of a manifest holds."""

    format: int


class SourceManifest(Config):
    """`source.json`: all that planning and model building need to know of a prepared source."""

    format: int
    kind: str
    text_fingerprint: str  # of the text tokenizer whose ids stand in the index
    clock: str  # "captured", "synthetic" (times made by a writer) or "none"
    skew_budget_ns: int  # |offset_ns| that captured members may have; 0 without a clock
    vectors: dict[str, VectorStats]  # by modality name: "ACTION", "STATE", "INERTIAL"
    splits: dict[str, SplitEntry]
    quarantined: dict[str, int]  # reason -> samples refused
    removed: dict[str, int] = {}  # reason -> readable samples left out: filters, duplicates

    @field_validator("splits")
    @classmethod
    def _known(cls, splits: dict[str, SplitEntry]) -> dict[str, SplitEntry]:
        if "train" not in splits or not set(splits) <= set(SPLITS):
            raise ValueError(f"it has {brief(', '.join(splits) or 'none')}, where train and perhaps heldout belong")
        return splits

    @model_validator(mode="after")
    def _scaled(self) -> "SourceManifest":
        present = {group.modality for split in self.splits.values() for group in split.groups}
        if lacking := sorted((present & set(VECTORS)) - self.vectors.keys()):
            raise ValueError(f"vectors has no statistics of {lacking[0]}, of which there are segments")
        return self

    @classmethod
    def load(cls, folder: str | Path, storage: Storage = DEFAULT) -> "SourceManifest":
        path = join(folder, MANIFEST)
        if local_path(path) and not Path(local_path(path)).is_file():
            raise DataError(f"{path} does not exist: {folder} is not a prepared source; run `mmoe prepare` to write it")
        content = storage.read(path, "the source")
        try:
            found = _Format.model_validate_json(content).format
            if found != FORMAT:
                raise DataError(f"{path} has format {found}, this version reads {FORMAT}; prepare it again")
            return cls.model_validate_json(content)
        except ValidationError as error:
            fault = error.errors()[0]
            key = brief(".".join(map(str, fault["loc"])) or "all of it", quoted=False)
            said = fault["msg"].removeprefix("Value error, ")
            raise DataError(
                f"{path} is not a source manifest ({key}: {said}); copy it again or prepare the source again"
            ) from error

    def save(self, folder: str | Path) -> None:
        (Path(folder) / MANIFEST).write_text(self.model_dump_json(indent=1))


class Member(NamedTuple):
    """A member of a tar: ``<key>.<field>``, byte offset and size of its content, and the CRC-32 that it must have."""

    name: str
    offset: int
    size: int
    crc32: int


def is_prepared(folder: str | Path, storage: Storage = DEFAULT) -> bool:
    """Whether an address, near or far, is that of a prepared source. Raises StorageError where a store does not say."""
    return storage.exists(join(folder, MANIFEST))


@dataclass(frozen=True)
class SegmentTable:
    """The segments of one shard in memory: row r owns ``segments[segment_offsets[r]:segment_offsets[r + 1]]``.

    Read alone, the fields are those in `PLANNED`: all that planning needs, at a fraction of the index's bytes.
    """

    tar: str
    segments: np.ndarray
    segment_offsets: np.ndarray

    @classmethod
    def read(cls, tar: str | Path, storage: Storage = DEFAULT, digest: str | None = None) -> "SegmentTable":
        """Raises DataError where it cannot be read, or is not the index of `digest` (`ShardEntry`)."""
        path = with_suffix(tar, ".parquet")
        columns = [f"segments.list.element.{name}" for name in PLANNED]
        table = read_table(path, INDEX_SCHEMA, storage, columns)
        found = (table.schema.metadata or {}).get(DIGEST, b"").decode(errors="replace")
        if digest is not None and found != digest:
            raise DataError(
                f"{path} is not the index that {MANIFEST} names (digest {found[:12]}, not {digest[:12]}): "
                "shards were replaced or changed places; copy the whole source again, or prepare it again"
            )
        segments = _chunk(table, "segments")
        records = _records(segments.flatten(), _PLANNED_DTYPE)
        check_segments(path, records)
        return cls(os.fspath(tar), records, _offsets(segments))

    def __len__(self) -> int:
        return len(self.segment_offsets) - 1


@dataclass(frozen=True)
class ShardIndex(SegmentTable):
    """The whole index of one shard in memory: flat arrays and the offsets that cut them into rows.

    Row r owns its range of `text_ids` (i32) and of the members as it does of the segments (`SEGMENT_DTYPE`).
    """

    keys: list[str]
    recordings: list[str]
    content_hashes: np.ndarray  # i64 [rows]
    member_names: pa.StringArray  # there are many, and few are asked for
    member_ranges: np.ndarray  # [members, 2] byte offset and size in the tar
    member_crc32: np.ndarray  # u32 [members]
    member_decord: np.ndarray  # bool [members]: a video that decord was proven to read as PyAV does
    member_offsets: np.ndarray
    text_ids: np.ndarray
    text_offsets: np.ndarray

    @classmethod
    def read(cls, tar: str | Path, storage: Storage = DEFAULT) -> "ShardIndex":
        path = with_suffix(tar, ".parquet")
        table = read_table(path, INDEX_SCHEMA, storage)
        members, text, segments = (_chunk(table, name) for name in ("members", "text_ids", "segments"))
        flat_members = members.flatten()
        ranges = [flat_members.field(name).to_numpy(zero_copy_only=False) for name in ("offset", "size")]
        index = cls(
            tar=os.fspath(tar),
            segments=_records(segments.flatten(), SEGMENT_DTYPE),
            segment_offsets=_offsets(segments),
            keys=table["key"].to_pylist(),
            recordings=table["recording"].to_pylist(),
            content_hashes=table["content_hash"].to_numpy(),
            member_names=flat_members.field("name"),
            member_ranges=np.stack(ranges, axis=1) if len(flat_members) else np.zeros((0, 2), np.int64),
            member_crc32=flat_members.field("crc32").to_numpy(zero_copy_only=False),
            member_decord=flat_members.field("decord").to_numpy(zero_copy_only=False),
            member_offsets=_offsets(members),
            text_ids=text.flatten().to_numpy(zero_copy_only=False),
            text_offsets=_offsets(text),
        )
        check_segments(path, index.segments)
        check_members(path, index.segments, index.segment_offsets, index.member_ranges, index.member_offsets)
        return index

    def check_tar(self, storage: Storage = DEFAULT) -> None:
        """Raises DataError where the tar is missing, or not as long as the one that was indexed."""
        size = storage.size(self.tar)
        if size is None or size == self.tar_bytes:
            return
        if size < self.tar_bytes:
            raise DataError(
                f"{self.tar} is truncated: it has {size} bytes, the tar of its index {self.tar_bytes}; copy it again "
                "or prepare the source again"
            )
        raise DataError(
            f"{self.tar} is not the tar its index describes: it has {size} bytes, that one {self.tar_bytes}; one of "
            "the two is older: copy both again or prepare the source again"
        )

    @property
    def tar_bytes(self) -> int:
        """Bytes of the tar that was indexed: up to its last member, two blocks of zeros, rounded up to a record."""
        if not len(self.member_ranges):
            return tarfile.RECORDSIZE
        offset, size = self.member_ranges[self.member_ranges[:, 0].argmax()].tolist()
        end = offset + size + -size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
        return end + -end % tarfile.RECORDSIZE

    @cached_property
    def rows(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.segment_offsets[:-1], self.segment_offsets[1:])]

    def row_segments(self, row: int) -> np.ndarray:
        return self.segments[self.rows[row]]

    def row_text(self, row: int) -> np.ndarray:
        return self.text_ids[self.text_offsets[row] : self.text_offsets[row + 1]]

    def row_member(self, row: int, member: int) -> tuple[str, int, int]:
        """Name, byte offset and size in the tar of a row's member."""
        at = self.member_offsets[row] + member
        offset, size = self.member_ranges[at]
        return self.member_names[at].as_py(), int(offset), int(size)

    def row_crc32(self, row: int, member: int) -> int:
        """CRC-32 of the content of a row's member, as it was written."""
        return int(self.member_crc32[self.member_offsets[row] + member])

    def member(self, row: int, member: int) -> Member:
        """A row's member as it lies in the tar, under its full name ``<key>.<field>``."""
        name, offset, size = self.row_member(row, member)
        return Member(f"{self.keys[row]}.{name}", offset, size, self.row_crc32(row, member))

    def row_members(self, row: int) -> int:
        """How many members a row has."""
        return int(self.member_offsets[row + 1] - self.member_offsets[row])

    def row_decord(self, row: int, member: int) -> bool:
        """Whether preparation proved that decord reads this video of a row as PyAV does."""
        return bool(self.member_decord[self.member_offsets[row] + member])


def write_index(tar: str | Path, rows: list[dict]) -> str:
    """Write the index beside `tar`: one dict a sample with the fields of `INDEX_SCHEMA`; returns its digest.

    `segments` is a `SEGMENT_DTYPE` array, `text_ids` an i32 array, `members` a list of (name, offset, size, crc32,
    decord) as in the schema.
    """
    columns = {name: [row[name] for row in rows] for name in ("key", "recording", "content_hash", "text_ids")}
    columns["members"] = [
        [dict(zip(("name", "offset", "size", "crc32", "decord"), member)) for member in row["members"]] for row in rows
    ]
    lengths = np.array([len(row["segments"]) for row in rows])
    flat = np.concatenate([row["segments"] for row in rows]) if rows else np.empty(0, SEGMENT_DTYPE)
    struct = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(flat[name])) for name in SEGMENT_DTYPE.names],
        fields=list(_SEGMENT_STRUCT),
    )
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns["segments"] = pa.ListArray.from_arrays(offsets, struct)
    digest = _digest(rows)
    schema = INDEX_SCHEMA.with_metadata({DIGEST: digest})
    write_table(pa.table(columns, schema=schema), Path(tar).with_suffix(".parquet"))
    return digest


def _digest(rows: list[dict]) -> str:
    """Of what the rows say, whatever the bytes that a version of parquet makes of them."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        said = (row["key"], row["recording"], int(row["content_hash"]), [list(member) for member in row["members"]])
        for part in (
            json.dumps(said).encode(),
            np.asarray(row["text_ids"], np.int32).tobytes(),
            np.ascontiguousarray(row["segments"]).tobytes(),
        ):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _records(flat: pa.StructArray, dtype: np.dtype) -> np.ndarray:
    rows = np.empty(len(flat), dtype)
    for name in dtype.names:
        rows[name] = flat.field(name).to_numpy(zero_copy_only=False)
    return rows


def _chunk(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], type=INDEX_SCHEMA.field(name).type)


def _offsets(array: pa.ListArray) -> np.ndarray:
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)
