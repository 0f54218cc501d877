"""Write and read shard indices, which state what is known of a shard without opening its tar.

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

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mmoe.addresses import join_address, with_suffix
from mmoe.data.index.check import check_members, check_segments
from mmoe.data.index.file import read_table, write_table
from mmoe.data.storage.store import DEFAULT_STORAGE, Storage
from mmoe.errors import DataError
from mmoe.hashing import blake2b, framed
from mmoe.schema.manifest import MANIFEST
from mmoe.schema.modality import BUILT_IN, Modality, renumbered
from mmoe.schema.sample import SEGMENT_DTYPE, SEGMENT_FIELDS

DIGEST = b"mmoe.digest"  # the key under which an index file holds its own
MODALITIES = b"modalities"  # names of those that are not built in, by code

# Of a segment, what its token count follows from.
PLANNED = ("modality", "slice", "camera", "start", "stop", "height", "width", "rate", "pair")
_PLANNED_DTYPE = np.dtype([(name, SEGMENT_DTYPE[name]) for name in PLANNED])
_SEGMENT_STRUCT = pa.struct([(name, pa.from_numpy_dtype(SEGMENT_DTYPE[name])) for name in SEGMENT_FIELDS])
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


class Member(NamedTuple):
    """States of a member of a tar where its content lies, and which checksum it must have.

    `name` is ``<key>.<field>``; then byte offset and size of the content, and its CRC-32.
    """

    name: str
    offset: int
    size: int
    crc32: int


def is_prepared(folder: str | Path, storage: Storage = DEFAULT_STORAGE) -> bool:
    """Return True if the folder at an address, near or far, is a prepared source.

    Raises StorageError where a store does not say.
    """
    return storage.exists(join_address(folder, MANIFEST))


@dataclass(frozen=True)
class SegmentTable:
    """Holds the segments of one shard in memory, cut into rows, one a sample.

    Row r owns ``segments[segment_offsets[r]:segment_offsets[r + 1]]``. Read alone, the fields are those in `PLANNED`:
    all that planning needs, at a fraction of the index's bytes.
    """

    tar: str
    segments: np.ndarray
    segment_offsets: np.ndarray

    @classmethod
    def read(cls, tar: str | Path, storage: Storage = DEFAULT_STORAGE, digest: str | None = None) -> "SegmentTable":
        """Read the segments from the index beside `tar`.

        Raises DataError where it cannot be read, or is not the index of `digest` (`ShardEntry`).
        """
        path = with_suffix(tar, ".parquet")
        columns = [f"segments.list.element.{name}" for name in PLANNED]
        table = _read(path, storage, digest, columns)
        segments = _chunk(table, "segments")
        records = _records(segments.flatten(), _PLANNED_DTYPE)
        _renumber(records, table, path)
        check_segments(path, records)
        return cls(os.fspath(tar), records, _offsets(segments))

    def __len__(self) -> int:
        return len(self.segment_offsets) - 1


@dataclass(frozen=True)
class ShardIndex(SegmentTable):
    """Holds the whole index of one shard in memory: flat arrays and the offsets that cut them into rows.

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
    def read(cls, tar: str | Path, storage: Storage = DEFAULT_STORAGE, digest: str | None = None) -> "ShardIndex":
        """Read all columns of the index beside `tar`.

        Raises DataError where it cannot be read, or is not the index of `digest`.
        """
        path = with_suffix(tar, ".parquet")
        table = _read(path, storage, digest)
        members, text, segments = (_chunk(table, name) for name in ("members", "text_ids", "segments"))
        flat_members = members.flatten()
        records = _records(segments.flatten(), SEGMENT_DTYPE)
        _renumber(records, table, path)
        ranges = [flat_members.field(name).to_numpy(zero_copy_only=False) for name in ("offset", "size")]
        index = cls(
            tar=os.fspath(tar),
            segments=records,
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

    def check_tar(self, storage: Storage = DEFAULT_STORAGE) -> None:
        """Raise DataError where the tar is missing, or not as long as the one that was indexed."""
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
        """The size in bytes of the tar that was indexed.

        It reaches up to its last member, then two blocks of zeros, rounded up to a record.
        """
        if not len(self.member_ranges):
            return tarfile.RECORDSIZE
        offset, size = self.member_ranges[self.member_ranges[:, 0].argmax()].tolist()
        end = offset + size + -size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
        return end + -end % tarfile.RECORDSIZE

    @cached_property
    def rows(self) -> list[slice]:
        """The range of every row in `segments`."""
        return [slice(a, b) for a, b in zip(self.segment_offsets[:-1], self.segment_offsets[1:])]

    def row_segments(self, row: int) -> np.ndarray:
        """Return the segments of a row, `SEGMENT_DTYPE` [n]."""
        return self.segments[self.rows[row]]

    def row_text(self, row: int) -> np.ndarray:
        """Return the token ids of all texts of a row, i32 [n]."""
        return self.text_ids[self.text_offsets[row] : self.text_offsets[row + 1]]

    def row_member(self, row: int, member: int) -> tuple[str, int, int]:
        """Return name, byte offset and size in the tar of a row's member."""
        at = self.member_offsets[row] + member
        offset, size = self.member_ranges[at]
        return self.member_names[at].as_py(), int(offset), int(size)

    def row_crc32(self, row: int, member: int) -> int:
        """Return the CRC-32 of the content of a row's member, as it was written."""
        return int(self.member_crc32[self.member_offsets[row] + member])

    def member(self, row: int, member: int) -> Member:
        """Return a row's member as it lies in the tar, under its full name ``<key>.<field>``."""
        name, offset, size = self.row_member(row, member)
        return Member(f"{self.keys[row]}.{name}", offset, size, self.row_crc32(row, member))

    def row_members(self, row: int) -> int:
        """Return how many members a row has."""
        return int(self.member_offsets[row + 1] - self.member_offsets[row])

    def row_decord(self, row: int, member: int) -> bool:
        """Return True if preparation proved that decord reads this video of a row as PyAV does."""
        return bool(self.member_decord[self.member_offsets[row] + member])


def write_index(tar: str | Path, rows: list[dict]) -> str:
    """Write the index beside `tar`, and return its digest.

    `rows` holds one dict a sample with the fields of `INDEX_SCHEMA`: `segments` is a `SEGMENT_DTYPE` array, `text_ids`
    an i32 array, `members` a list of (name, offset, size, crc32, decord) as in the schema.
    """
    columns = {name: [row[name] for row in rows] for name in ("key", "recording", "content_hash", "text_ids")}
    columns["members"] = [
        [dict(zip(("name", "offset", "size", "crc32", "decord"), member)) for member in row["members"]] for row in rows
    ]
    lengths = np.array([len(row["segments"]) for row in rows])
    flat = np.concatenate([row["segments"] for row in rows]) if rows else np.empty(0, SEGMENT_DTYPE)
    struct = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(flat[name])) for name in SEGMENT_FIELDS],
        fields=list(_SEGMENT_STRUCT),
    )
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns["segments"] = pa.ListArray.from_arrays(offsets, struct)
    digest = _digest(rows)
    further = Modality.names[BUILT_IN:] if len(flat) and flat["modality"].max() >= BUILT_IN else []
    schema = INDEX_SCHEMA.with_metadata({DIGEST: digest, **({MODALITIES: json.dumps(further)} if further else {})})
    write_table(pa.table(columns, schema=schema), Path(tar).with_suffix(".parquet"))
    return digest


def _digest(rows: list[dict]) -> str:
    """Digest what the rows say, whatever the bytes that a version of parquet makes of them."""

    def parts() -> Iterator[bytes]:
        for row in rows:
            members = [list(member) for member in row["members"]]
            yield json.dumps((row["key"], row["recording"], int(row["content_hash"]), members)).encode()
            yield np.asarray(row["text_ids"], np.int32).tobytes()
            yield np.ascontiguousarray(row["segments"]).tobytes()

    return blake2b(framed(parts()), 16).hex()


def _read(path: str, storage: Storage, digest: str | None, columns: list[str] | None = None) -> pa.Table:
    table = read_table(path, INDEX_SCHEMA, storage, columns)
    found = (table.schema.metadata or {}).get(DIGEST, b"").decode(errors="replace")
    if digest is not None and found != digest:
        raise DataError(
            f"{path} is not the index that {MANIFEST} names (digest {found[:12]}, not {digest[:12]}): "
            "shards were replaced or changed places; copy the whole source again, or prepare it again"
        )
    return table


def _renumber(records: np.ndarray, table: pa.Table, path: str) -> None:
    """Number the modalities of segments as this process does, whatever was registered where they were prepared."""
    stored = (table.schema.metadata or {}).get(MODALITIES)
    if stored is not None:
        records["modality"] = renumbered(records["modality"], json.loads(stored), path)


def _records(flat: pa.StructArray, dtype: np.dtype) -> np.ndarray:
    rows = np.empty(len(flat), dtype)
    for name in dtype.names or ():
        rows[name] = flat.field(name).to_numpy(zero_copy_only=False)
    return rows


def _chunk(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], type=INDEX_SCHEMA.field(name).type)


def _offsets(array: pa.ListArray) -> np.ndarray:
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)
