"""The shard index and the source manifest: what is known of the data without opening a tar.

A prepared source is a folder::

    source.json                     SourceManifest
    train/shard-000000.tar          WebDataset shard
    train/shard-000000.parquet      its index: one row a sample
    heldout/...                     the same for the held-out recordings
    quarantine.jsonl                what was refused at preparation, with the reason

The parquet row holds the key, the recording, the byte range of every member in the tar (so that one member
is one range read), the token ids of the sample's text, and its segments (`SEGMENT_DTYPE`).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mmoe.config.base import Config
from mmoe.data.sample import SEGMENT_DTYPE
from mmoe.errors import DataError

FORMAT = 1
MANIFEST = "source.json"
SPLITS = ("train", "heldout")

_SEGMENT_STRUCT = pa.struct([(name, pa.from_numpy_dtype(SEGMENT_DTYPE[name])) for name in SEGMENT_DTYPE.names])
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("recording", pa.string()),
        ("content_hash", pa.int64()),
        (
            "members",
            pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])),
        ),
        ("text_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(_SEGMENT_STRUCT)),
    ]
)


class VectorStats(Config):
    """Per-dimension statistics of an ACTION, STATE or INERTIAL stream over the training split."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    period_ns: int = 0  # of the rows of an action table; 0 where rows have no fixed period


class ShardEntry(Config):
    path: str  # of the tar, relative to the source folder; the index has the same stem
    rows: int
    bytes: int


class SplitEntry(Config):
    samples: int
    recordings: int
    shards: tuple[ShardEntry, ...]
    segments: dict[str, int]  # count by modality name


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

    @classmethod
    def load(cls, folder: str | Path) -> "SourceManifest":
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise DataError(f"{path} does not exist: {folder} is not a prepared source; run `mmoe prepare` to write it")
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DataError(
                f"{path} is not a source manifest ({error.errors()[0]['msg']}); prepare it again"
            ) from error
        if manifest.format != FORMAT:
            raise DataError(f"{path} has format {manifest.format}, this version reads {FORMAT}; prepare it again")
        return manifest

    def save(self, folder: str | Path) -> None:
        (Path(folder) / MANIFEST).write_text(self.model_dump_json(indent=1))


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard in memory: flat arrays and the offsets that cut them into rows.

    Row r owns ``segments[segment_offsets[r]:segment_offsets[r + 1]]``, likewise `text_ids` (i32) and members.
    """

    tar: str
    keys: list[str]
    recordings: list[str]
    member_names: list[str]
    member_ranges: np.ndarray  # [members, 2] byte offset and size in the tar
    member_offsets: np.ndarray
    text_ids: np.ndarray
    text_offsets: np.ndarray
    segments: np.ndarray  # SEGMENT_DTYPE
    segment_offsets: np.ndarray

    @classmethod
    def read(cls, tar: str | Path) -> "ShardIndex":
        tar = Path(tar)
        path = tar.with_suffix(".parquet")
        try:
            table = pq.read_table(path, schema=INDEX_SCHEMA).combine_chunks()
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: the shard {tar.name} has no index; prepare the source again"
            ) from None
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} cannot be read as a shard index ({error}); prepare the source again") from error
        members, text, segments = (_chunk(table, name) for name in ("members", "text_ids", "segments"))
        flat_members, flat_segments = members.flatten(), segments.flatten()
        rows = np.empty(len(flat_segments), dtype=SEGMENT_DTYPE)
        for name in SEGMENT_DTYPE.names:
            rows[name] = flat_segments.field(name).to_numpy(zero_copy_only=False)
        ranges = [flat_members.field(name).to_numpy(zero_copy_only=False) for name in ("offset", "size")]
        return cls(
            tar=str(tar),
            keys=table["key"].to_pylist(),
            recordings=table["recording"].to_pylist(),
            member_names=flat_members.field("name").to_pylist(),
            member_ranges=np.stack(ranges, axis=1) if len(flat_members) else np.zeros((0, 2), np.int64),
            member_offsets=_offsets(members),
            text_ids=text.flatten().to_numpy(zero_copy_only=False),
            text_offsets=_offsets(text),
            segments=rows,
            segment_offsets=_offsets(segments),
        )

    def __len__(self) -> int:
        return len(self.keys)

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
        return self.member_names[at], int(offset), int(size)


def write_index(tar: str | Path, rows: list[dict]) -> None:
    """Write the index beside `tar`: one dict a sample with the fields of `INDEX_SCHEMA`.

    `segments` is a `SEGMENT_DTYPE` array, `text_ids` an i32 array, `members` a list of (name, offset, size).
    """
    columns = {name: [row[name] for row in rows] for name in ("key", "recording", "content_hash", "text_ids")}
    columns["members"] = [
        [{"name": name, "offset": offset, "size": size} for name, offset, size in row["members"]] for row in rows
    ]
    lengths = np.array([len(row["segments"]) for row in rows])
    flat = np.concatenate([row["segments"] for row in rows]) if rows else np.empty(0, SEGMENT_DTYPE)
    struct = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(flat[name])) for name in SEGMENT_DTYPE.names],
        fields=list(_SEGMENT_STRUCT),
    )
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns["segments"] = pa.ListArray.from_arrays(offsets, struct)
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), Path(tar).with_suffix(".parquet"), compression="zstd")


def _chunk(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], type=INDEX_SCHEMA.field(name).type)


def _offsets(array: pa.ListArray) -> np.ndarray:
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)
