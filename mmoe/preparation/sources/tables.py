"""Lists the rows of tables, whatever they are stored as, for all readers of rows.

======================== ==========================================================================================
file                     rows
======================== ==========================================================================================
``.jsonl``, ``.json``    one JSON object a line; a list of objects
``.csv``, ``.tsv``       one line, or more in quotes, under a head that names the columns: see `delimited`
``.parquet``, ``.arrow`` as they are stored: see `columnar`
======================== ==========================================================================================

All but ``.json``, ``.parquet`` and ``.arrow`` may be compressed (``.gz``, ``.zst``). In a folder that
`datasets.save_to_disk` wrote, ``state.json`` says which ``.arrow`` files are the data; others are caches of its
library and are refused, so that they are counted.

A row is read when its sample is made, of a columnar table only the columns that are asked for.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmoe.errors import did_you_mean
from mmoe.preparation.sources import columnar, delimited, files, jsonl, ranges
from mmoe.preparation.sources.base import Refuse, Refused

COLUMNAR = (".parquet", ".arrow")
DELIMITED = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".json", *DELIMITED, *COLUMNAR)
_TABLE = re.compile(r"(\.jsonl|\.csv|\.tsv)(\.gz|\.zst)?$|\.(json|parquet|arrow)$", re.IGNORECASE)
_STEM = re.compile(r"\.txt(\.gz|\.zst)?$|" + _TABLE.pattern, re.IGNORECASE)  # what is left off at the end
_MOST_NAMES = 50  # of columns in a message
NO_COLUMN = "no such column"  # the reason of a `Refused` table
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"  # beside the data, by datasets


class TableRow(Protocol):
    """Is a row of a table, still to be read: [start, stop) is its extent in it, in bytes or rows."""

    @property
    def start(self) -> int:
        """Where the row begins."""

    @property
    def stop(self) -> int:
        """Where the next one begins."""

    @property
    def where(self) -> str:
        """Name its place in messages."""

    @property
    def folder(self) -> Path:
        """The folder that paths in the row are relative to."""

    def load(self, columns: Iterable[str]) -> dict[str, Any]:
        """Read the row, at least those of the columns that it has; raise DataError."""


@dataclass(frozen=True)
class Tables:
    """Holds the tables among the files of a folder, and the files that say which these are."""

    tables: frozenset[Path]
    described: frozenset[Path]


def is_table(file: Path) -> bool:
    """Tell by its name whether a file is a table."""
    return _TABLE.search(file.name) is not None


def is_columnar(file: Path) -> bool:
    """Tell by its name whether a table is stored by columns, so that it has the same ones in every row."""
    return ranges.plain_suffix(file) in COLUMNAR


def find_tables(found: list[Path], root: Path, quarantine: Refuse) -> Tables:
    """Find the tables among the files `found` below `root`; what is missing of a saved set is refused."""
    present = set(found)
    tables = [file for file in found if is_table(file)]
    described = {file for file in found if file.name == _SPLITS}
    for state in (file for file in found if file.name == _STATE and (file.parent / _INFO) in present):
        described |= {state, state.parent / _INFO}
        try:
            named = _data_files(state)
        except Refused as refusal:
            quarantine(state.relative_to(root).as_posix(), refusal)
            named = []
        for file in named:
            if file not in present:
                message = f"{file}, named by {state}, is not beside it; restore it there, or save the set again"
                key = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
                quarantine(key, Refused("missing file", message))
        tables = [file for file in tables if file.parent != state.parent or file in named]
    beside = {file.parent for file in tables if is_columnar(file)}
    described |= {file for file in found if file.name == _INFO and file.parent in beside}
    return Tables(frozenset(tables) - described, frozenset(described))


def column_names(file: Path) -> tuple[str, ...] | None:
    """Read the names of a table's columns; None where each row has its own (JSON)."""
    if is_columnar(file):
        return tuple(columnar.read_schema(file).names)
    return delimited.read_head(file).names if ranges.plain_suffix(file) in DELIMITED else None


def check_columns(file: Path, wanted: Sequence[str], option: str) -> None:
    """Raise `Refused` where a table has none of the columns `wanted`, which the reader's `option` names.

    Rows of JSON are asked one after another, until one has a column.
    """
    names = column_names(file)
    names = _names_in_rows(file, wanted) if names is None else names
    if names is None or any(name in names for name in wanted):
        return
    hint = did_you_mean(wanted[0], names) or "."
    message = (
        f"{file} has no column {' or '.join(map(repr, wanted))}{hint} "
        f"Set the option {option} to one of {', '.join(names)}"
    )
    raise Refused(NO_COLUMN, message)


def check_text(file: Path, column: str, option: str) -> None:
    """Raise `Refused` where the column of a columnar table holds something else than text."""
    if is_columnar(file) and not columnar.holds_text(columnar.read_schema(file), column):
        kind = columnar.read_schema(file).field(column).type
        message = f"{file}: column {column!r} holds {kind}, not text; set the option {option} to a text column"
        raise Refused(NO_COLUMN, message)


def list_rows(file: Path, stem: str, quarantine: Refuse) -> Iterator[TableRow]:
    """Yield the rows of a table in their order; those that are none are refused, under keys ``<stem>-line-<n>``."""
    if is_columnar(file):
        numbers = ((part, row) for part, count in enumerate(columnar.part_rows(file)) for row in range(count))
        yield from (_ColumnRow(file, part, row, number) for number, (part, row) in enumerate(numbers))
    elif ranges.plain_suffix(file) in DELIMITED:
        head = delimited.read_head(file)
        for record in delimited.delimited_records(file):
            if isinstance(record.cells, Refused):
                quarantine(f"{stem}-line-{record.line}", record.cells)
            else:
                yield _RecordRow(file, record.start, record.stop, record.line, head)
    elif ranges.plain_suffix(file) == ".json":
        yield from (_LineRow(file, start, stop) for start, stop in jsonl.listed_rows(file))
    else:
        with ranges.open_stream(file) as stream:
            for start, line in jsonl.lines(stream):
                if start in (0, len(jsonl.BOM)):
                    jsonl.check_utf16(line, file)
                if line:
                    yield _LineRow(file, start, start + len(line))


def light_rows(
    file: Path, stem: str, media: str, columns: tuple[str, ...], quarantine: Refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of every row, but for the bytes of its media: see `columnar.cell_rows`."""
    if is_columnar(file):
        yield from columnar.cell_rows(file, stem, media, columns)
    elif ranges.plain_suffix(file) in DELIMITED:
        for record in delimited.delimited_records(file):
            if isinstance(record.cells, Refused):
                quarantine(f"{stem}-line-{record.line}", record.cells)
            else:
                yield f"{file}, line {record.line}", dict(record.cells)
    else:
        yield from _json_rows(file, stem, quarantine)


def suggest_text(found: Iterable[Path], known: tuple[str, ...], others: tuple[str, ...] = ()) -> str | None:
    """Name the column with the longest text in the first row of the first table among the files `found`.

    None where it has one of the `known` columns or no text; the `others` hold something else.
    """
    for file in found:
        if not is_table(file):
            continue
        row = next(list_rows(file, file.stem, lambda key, refusal: None), None)
        if row is None:
            continue
        schema = columnar.read_schema(file) if is_columnar(file) else None
        names = [] if schema is None else [name for name in schema.names if columnar.holds_text(schema, name)]
        texts = {name: value for name, value in row.load(names).items() if isinstance(value, str)}
        if not texts.keys().isdisjoint(known):
            return None
        return max(texts.keys() - set(others), key=lambda name: (len(texts[name]), name), default=None)
    return None


def table_stem(file: Path, root: Path) -> str:
    """Return what the keys of a file's rows begin with: its path below `root` without suffix, dots as underscores."""
    return _STEM.sub("", file.relative_to(root).as_posix()).replace(".", "_")


@dataclass(frozen=True)
class _FileRow:
    file: Path

    @property
    def folder(self) -> Path:
        return self.file.parent


@dataclass(frozen=True)
class _LineRow(_FileRow):
    start: int
    stop: int

    @property
    def where(self) -> str:
        return f"{self.file}, byte {self.start}"

    def load(self, columns: Iterable[str]) -> dict[str, Any]:
        return jsonl.parse_row(ranges.read_range(self.file, self.start, self.stop), self.file, self.start, self.where)


@dataclass(frozen=True)
class _RecordRow(_FileRow):
    start: int
    stop: int
    line: int
    head: delimited.TableHead

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"

    def load(self, columns: Iterable[str]) -> dict[str, Any]:
        data = ranges.read_range(self.file, self.start, self.stop)
        return dict(delimited.parse_record(data, self.head, self.file, self.start, self.where))


@dataclass(frozen=True)
class _ColumnRow(_FileRow):
    part: int
    row: int
    start: int  # its number in the file

    @property
    def stop(self) -> int:
        return self.start + 1

    @property
    def where(self) -> str:
        return columnar.row_place(self.file, self.part, self.row)

    def load(self, columns: Iterable[str]) -> dict[str, Any]:
        return columnar.read_row(self.file, self.part, self.row, columns)


def _names_in_rows(file: Path, wanted: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a row that has one of the `wanted`, else those of all rows; None where no row can be read."""
    names: dict[str, None] = {}
    for _, row in _json_rows(file, "", lambda key, refusal: None):
        if any(name in row for name in wanted):
            return tuple(row)
        names |= dict.fromkeys(list(row)[: max(0, _MOST_NAMES - len(names))])
    return tuple(names) or None


def _json_rows(file: Path, stem: str, quarantine: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (place, row) of every row of JSON in a file."""
    if ranges.plain_suffix(file) != ".json":
        yield from jsonl.rows(file, quarantine)
        return
    for number, (start, stop) in enumerate(jsonl.listed_rows(file)):
        row = _LineRow(file, start, stop)
        try:
            yield row.where, row.load(())
        except Refused as refusal:
            quarantine(f"{stem}-{number:06d}", refusal)


def _data_files(state: Path) -> list[Path]:
    """The tables that a ``state.json`` names, which lie beside it."""
    try:
        content = jsonl.parse(jsonl.decode_text(files.read_regular(state), state, 0), str(state))
        return [state.parent / entry["filename"] for entry in content["_data_files"]]
    except (OSError, LookupError, TypeError) as error:
        message = f"{state} does not name the tables of its folder ({error}); save the set again, or remove the file"
        raise Refused("malformed row", message) from error
