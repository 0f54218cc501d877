"""Reads tables stored by columns: ``.parquet``, and ``.arrow`` as `datasets.save_to_disk` or Feather write it.

A table comes in parts (row groups, record batches), and each process keeps the columns of the last part that it was
asked for: as preparation makes samples in the order of the list, every part is read once. Arrow files are mapped into
memory, not read. An image or audio clip is a cell of bytes, or of ``{bytes, path}`` as Hugging Face's features Image
and Audio store it; what lists a table reads the paths alone, not the bytes. The numbers of its feature ClassLabel are
read as the names that they stand for.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe.data.load.reading import reading, unreadable
from mmoe.errors import Refused, counted_as
from mmoe.preparation.sources.files import open_regular
from mmoe.schema.bounds import check_bound

_REMEDY = "restore it or remove it"
_ARROW_FILE = b"ARROW1"  # with which the random-access form of Arrow IPC begins; a stream has no mark


@dataclass(frozen=True)
class Cell:
    """Names a cell of a table, whose value is read when it is asked for.

    `key` names its row, and `path` is what stands beside its bytes, or in their place.
    """

    file: Path
    part: int
    row: int
    column: str
    key: str = ""
    path: str | None = None

    @property
    def named(self) -> Path | None:
        """The file that its path names, beside its table; None where it has no path."""
        return self.file.parent / self.path if self.path else None

    def read(self) -> Any:
        """Read the value as Python has it; raise DataError where it cannot be read."""
        return read_row(self.file, self.part, self.row, (self.column,))[self.column]


def read_row(file: Path, part: int, row: int, columns: Iterable[str]) -> dict[str, Any]:
    """Read a row, those of the `columns` that there are; raise DataError where they cannot be read."""
    remedy = f"the file is damaged: {_REMEDY}"
    with counted_as("unreadable file"), reading("row", row_place(file, part, row), remedy):
        content = _part(file, _stamp(file), part)
        return {name: content.value(name, row) for name in columns if name in content.names}


def row_place(file: Path, part: int, row: int) -> str:
    """Say in which file, and where in it, a row lies."""
    return f"{file}, {'row group' if _is_parquet(file) else 'record batch'} {part}, row {row}"


def read_schema(file: Path) -> pa.Schema:
    """Read the names and types of the columns; raise DataError where the file has none, or two of one name."""
    with reading("parquet file" if _is_parquet(file) else "Arrow file", str(file), _REMEDY):
        if _is_parquet(file):
            with _parquet(file) as table:
                schema = table.schema_arrow
        else:
            with _arrow(file) as reader:
                schema = reader.schema
        names = schema.names  # decoded when they are asked for: they may be no UTF-8
    if not names:
        raise Refused("no such column", f"{file} has no columns; write it with some, or remove it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused("malformed row", f"{file} names the column {twice!r} twice; rename one of them")
    return schema


def part_rows(file: Path) -> Iterator[int]:
    """Yield the rows of each part; raise DataError after the parts of a file that is truncated."""
    if _is_parquet(file):
        with reading("parquet file", str(file), _REMEDY), _parquet(file) as table:
            counts = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
        yield from counts
        return
    with reading("Arrow file", str(file), _REMEDY):
        mapped = _mapped(file, _stamp(file))
    yield from (batch.num_rows for batch in mapped.batches)
    if mapped.fault is not None:
        raise unreadable("Arrow file", str(file), mapped.fault, _REMEDY)


def cell_rows(file: Path, key: str, media: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of every row: the `columns` that there are, and for the column `media` what it names.

    That is a path where the column holds paths, else the `Cell` of the bytes; its key is ``<key>-<number of the row>``.
    """
    number = 0
    for part, count in enumerate(part_rows(file)):
        where = row_place(file, part, 0)
        with counted_as("unreadable file"), reading("row", where, f"the file is damaged: {_REMEDY}"):
            content = _part(file, _stamp(file), part)
            lists = {name: content.values(name) for name in columns if name in content.names}
            paths, stored = content.paths(media)
        for row in range(count):
            cell = Cell(file, part, row, media, f"{key}-{number:06d}", paths[row])
            values = {name: values[row] for name, values in lists.items()}
            yield row_place(file, part, row), {**values, media: cell if stored else paths[row]}
            number += 1


def holds_text(schema: pa.Schema, column: str) -> bool:
    """Tell whether a column holds text, or the numbers of classes whose names `datasets` keeps in the schema."""
    return _is_text(schema.field(column).type) or bool(_class_names(schema, column))


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """The names of the classes that a column numbers: Hugging Face's feature ClassLabel."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None or not pa.types.is_integer(schema.field(column).type):
        return []
    try:
        feature = json.loads(stored)["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else []
    except (ValueError, LookupError, TypeError):  # said by something else than `datasets`
        return []


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


class _Part:
    """The columns of a row group or a record batch, each read once."""

    def __init__(self, file: Path, number: int, batch: pa.RecordBatch | None) -> None:
        self._file, self._number, self._batch = file, number, batch
        self._columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        self._classes: dict[str, list[str]] = {}
        if batch is not None:
            self._schema, self._rows = batch.schema, batch.num_rows
        else:
            with _parquet(file) as table:
                self._schema, self._rows = table.schema_arrow, table.metadata.row_group(number).num_rows
        self.names = self._schema.names

    def column(self, name: str) -> pa.Array | pa.ChunkedArray:
        if name not in self._columns:
            self._columns[name] = self._checked(self._leaf(name) if self._batch is None else self._batch.column(name))
        return self._columns[name]

    def value(self, name: str, row: int) -> Any:
        return self._named(name, self.column(name)[row].as_py())

    def values(self, name: str) -> list[Any]:
        return [self._named(name, value) for value in self.column(name).to_pylist()]

    def _named(self, column: str, value: Any) -> Any:
        """The name of a class in place of its number, where the table has names and there is such a class."""
        names = self._classes.setdefault(column, _class_names(self._schema, column)) if type(value) is int else []
        return names[value] if names and 0 <= value < len(names) else value

    def paths(self, media: str) -> tuple[list[str | None], bool]:
        """Read the paths in a column, None where there is none, and whether it can hold bytes besides."""
        kind = self._schema.field(media).type
        if _is_text(kind):
            return self.column(media).to_pylist(), False
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return [None] * self._rows, True
        inside = self._batch.column(media) if self._batch is not None else self._leaf(f"{media}.path")
        named = self._checked(pc.struct_field(inside, "path"))
        return named.to_pylist(), kind.get_field_index("bytes") >= 0

    def _checked(self, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """The column, where what it says of itself is true: a damaged one would be believed its lengths and offsets."""
        column.validate(full=True)
        if len(column) != self._rows:
            raise ValueError(f"a column has {len(column)} rows, its part {self._rows}")
        return column

    def _leaf(self, name: str) -> pa.ChunkedArray:
        """A column of a row group, or with a dot what stands in it under that name."""
        with _parquet(self._file) as table:
            # Of all columns: pyarrow ends the process where one is asked for and its statistics are damaged.
            size = table.metadata.row_group(self._number).total_byte_size
            check_bound("file_bytes", size, f"{self._file}, row group {self._number}", "has too many bytes")
            return table.read_row_group(self._number, columns=[name]).column(0)


@lru_cache(maxsize=1)
def _part(file: Path, stamp: tuple[int, int], number: int) -> _Part:
    return _Part(file, number, None if _is_parquet(file) else _mapped(file, stamp).batches[number])


@dataclass(frozen=True)
class _Mapped:
    """The record batches of an Arrow file as far as they can be read, and why there are no more."""

    batches: list[pa.RecordBatch]
    fault: Exception | None


@lru_cache(maxsize=1)
def _mapped(file: Path, stamp: tuple[int, int]) -> _Mapped:
    batches: list[pa.RecordBatch] = []
    reader = _arrow(file)
    try:
        if isinstance(reader, pa.RecordBatchFileReader):
            batches.extend(reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches.extend(reader)
    except (pa.ArrowException, OSError) as error:
        return _Mapped(batches, error)
    return _Mapped(batches, None)


def _arrow(file: Path) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    open_regular(file).close()
    mapped = pa.memory_map(str(file))
    begin = mapped.read(len(_ARROW_FILE))
    mapped.seek(0)
    return pa.ipc.open_file(mapped) if begin == _ARROW_FILE else pa.ipc.open_stream(mapped)


def _parquet(file: Path) -> pq.ParquetFile:
    open_regular(file).close()
    return pq.ParquetFile(file)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _stamp(file: Path) -> tuple[int, int]:
    """What tells a file from one that has been written in its place."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
