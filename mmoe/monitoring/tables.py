"""Stores tables in a folder of Parquet parts, each some consecutive records, each named by its first step.

A part has a row a record: its `step`, its `session`, and a column a table, flattened; the schema's metadata has the
format's version and the shapes. Counts are the narrowest of 4 and 8 bytes that holds them, split into streams of
bytes before zstd: of the 10B shape they take a third less than packed differences do (`benchmarks/records.py`).
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe.errors import DataError
from mmoe.monitoring.record import StepRecord

FOLDER = "tables"
TABLES_VERSION = "1"
_VERSION, _SHAPES = b"mmoe.tables", b"mmoe.shapes"
_PART = re.compile(r"step-(\d{9,})\.parquet")


@dataclass(frozen=True)
class TableChunk:
    """Holds consecutive records of one table: R `steps`, and `values` of R rows (counts i64, else as recorded)."""

    steps: np.ndarray
    values: np.ndarray


def encode(records: Sequence[StepRecord]) -> bytes:
    """Encode the tables of `records`, which all have the same ones, as one part."""
    shapes = {name: table.shape for name, table in records[0].tables.items()}
    columns: dict[str, pa.Array] = {
        "step": pa.array([record.step for record in records], pa.int64()),
        "session": pa.array([record.session for record in records], pa.int64()),
    }
    for name, shape in shapes.items():
        values = _narrow(np.stack([record.tables[name] for record in records]))
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(shape)))
    metadata = {_VERSION: TABLES_VERSION.encode(), _SHAPES: json.dumps(shapes).encode()}
    target = io.BytesIO()
    pq.write_table(
        pa.table(columns).replace_schema_metadata(metadata),
        target,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in shapes},
    )
    return target.getvalue()


def decode_part(content: bytes, path: Path) -> list[StepRecord]:
    """Decode all records of a part; `path` names it in errors.

    Raises DataError where it is no part of this format.
    """
    with _naming(path):
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as parquet:
            table = parquet.read(use_threads=False)  # whose threads would let go of `content` while decoders are forked
        shapes = _shapes(table.schema, path)
        steps, sessions = table["step"].to_pylist(), table["session"].to_pylist()
        tables = {name: _values(table[name], shape) for name, shape in shapes.items()}
    return [
        StepRecord(step, session, tables={name: values[row] for name, values in tables.items()})
        for row, (step, session) in enumerate(zip(steps, sessions))
    ]


def part_path(folder: Path, step: int) -> Path:
    """Return the path of the part whose first record is that of `step`."""
    return folder / f"step-{step:09d}.parquet"


def part_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the parts of a store with their first steps, in order; none where there is no store."""
    found = ((_PART.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match[1]), path) for match, path in found if match)


def table_names(folder: Path) -> list[str]:
    """Return the names of the tables that the store's last part has."""
    if not (found := part_files(folder)):
        return []
    path = found[-1][1]
    with _naming(path):
        return list(_shapes(pq.read_schema(path), path))


def read(folder: Path, name: str, start: int = 0, stop: int | None = None) -> Iterator[TableChunk]:
    """Yield the table `name` of the records after step `start` up to and with step `stop`, a part at a time, in order.

    Parts outside that range and other tables are not read; parts without the table are passed over. Raises DataError.
    """
    found = part_files(folder)
    ends = [first for first, _ in found[1:]] + [None]
    for (first, path), end in zip(found, ends):
        if (end is not None and end <= start + 1) or (stop is not None and first > stop):
            continue
        with _naming(path), pq.ParquetFile(path) as file:
            shapes = _shapes(file.schema_arrow, path)
            if name not in shapes:
                continue
            table = file.read(columns=["step", name])
            steps, values = table["step"].to_numpy(), _values(table[name], shapes[name])
        wanted = (steps > start) & (steps <= (steps.max(initial=0) if stop is None else stop))
        if wanted.any():
            yield TableChunk(steps[wanted], values[wanted])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged part into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a part of a store of tables ({error}); restore it, or delete it and lose the "
            "tables of its steps"
        ) from error


def _shapes(schema: pa.Schema, path: Path) -> dict[str, tuple[int, ...]]:
    metadata = schema.metadata or {}
    version = metadata.get(_VERSION, b"none").decode(errors="replace")
    if version != TABLES_VERSION:
        raise DataError(
            f"{path} is of format {version}, and this version of mmoe reads format {TABLES_VERSION} of {FOLDER}/; go "
            f"on with the version that wrote it, or move {path.parent} away"
        )
    return {name: tuple(shape) for name, shape in json.loads(metadata[_SHAPES]).items()}


def _narrow(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        return values
    limits = np.iinfo(np.int32)
    fits = limits.min <= values.min(initial=0) and values.max(initial=0) <= limits.max
    return values.astype(np.int32 if fits else np.int64)


def _values(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
    return values.astype(np.int64) if values.dtype.kind == "i" else values
