"""Reads tables of separated cells: ``.csv`` (commas, or semicolons where the head has no comma) and ``.tsv`` (tabs).

The first line names the columns. Cells may stand in double quotes, and then hold separators and line breaks. A row
that is no such row, has another number of cells or is not UTF-8 is refused alone, with the number of its line.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mmoe.preparation.sources import ranges
from mmoe.preparation.sources.base import Refused
from mmoe.preparation.sources.jsonl import decode_text
from mmoe.schema.bounds import bounds, check_bound


@dataclass(frozen=True)
class TableHead:
    """Names the columns of a table, and the character between its cells."""

    names: tuple[str, ...]
    delimiter: str


@dataclass(frozen=True)
class DelimitedRecord:
    """Holds a row of a table: bytes [start, stop) of it from `line` on, and its cells, or why it has none."""

    start: int
    stop: int
    line: int
    cells: dict[str, str] | Refused


def read_head(file: Path) -> TableHead:
    """Read the names of the columns; raise `Refused` where the first line does not name them."""
    with ranges.open_stream(file) as stream:
        return _head(file, _Lines(stream, file))


def delimited_records(file: Path) -> Iterator[DelimitedRecord]:
    """Yield the rows of a table in their order; raise `Refused` where its first line does not name the columns."""
    with ranges.open_stream(file) as stream:
        lines = _Lines(stream, file)
        head = _head(file, lines)
        reader = _reader(lines, head.delimiter)
        while True:
            start, line = lines.at, lines.number + 1
            cells: dict[str, str] | Refused
            try:
                found = next(reader)
                if not found:
                    continue
                cells = _cells(found, head, f"{file}, line {line}")
            except StopIteration:
                return
            except csv.Error as error:  # the next call begins a row at the next line
                cells = _broken(file, line, lines.number, error)
            except Refused as refusal:
                cells = refusal
            yield DelimitedRecord(start, lines.at, line, cells)


def parse_record(data: bytes, head: TableHead, file: Path, start: int, where: str) -> dict[str, str]:
    """Return the cells, by column, of the row that stands at byte `start` of `file`; raise `Refused`."""
    text = io.StringIO(decode_text(data, file, start), newline="")
    try:
        return _cells(next(_reader(text, head.delimiter)), head, where)
    except csv.Error as error:
        raise Refused("malformed row", f"{where} is not CSV ({error}); repair it") from error


class _Lines:
    """The decoded lines of a table, with their ends; `at` and `number` say how far they were read."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self.at, self.number = 0, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        start, most = self.at, bounds().row_bytes
        line = self._stream.readline(most + 1)
        if not line:
            raise StopIteration
        self.number, self.at = self.number + 1, start + len(line)
        while len(line) > most and not line.endswith(b"\n"):
            rest = self._stream.readline(most + 1)
            self.at += len(rest)
            if not rest or rest.endswith(b"\n"):
                break
        check_bound("row_bytes", len(line), f"{self._file}, line {self.number}", "is a row of too many bytes")
        return decode_text(line, f"{self._file}, line {self.number}" if start else self._file, start)


def _reader(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(bounds().row_bytes)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _head(file: Path, lines: _Lines) -> TableHead:
    try:
        first = next(lines)
    except StopIteration:
        raise Refused("no such column", f"{file} is empty; its first line must name the columns") from None
    delimiter = "\t" if ranges.plain_suffix(file) == ".tsv" else ";" if "," not in first and ";" in first else ","
    try:
        names = next(_reader(iter([first]), delimiter))
    except (csv.Error, StopIteration) as error:
        message = f"{file}, line 1 does not name the columns ({error}); repair it"
        raise Refused("malformed row", message) from error
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise Refused("malformed row", f"{file}, line 1 names the column {twice[0]!r} twice; rename one of them")
    return TableHead(tuple(names), delimiter)


def _cells(found: list[str], head: TableHead, where: str) -> dict[str, str]:
    if len(found) != len(head.names):
        message = f"{where} has {len(found)} cells, and the head names {len(head.names)} columns; repair or remove it"
        raise Refused("malformed row", message)
    return {name: cell for name, cell in zip(head.names, found) if cell}  # an empty cell says nothing


def _broken(file: Path, first: int, last: int, error: csv.Error) -> Refused:
    place = f"line {first}" if first == last else f"lines {first} to {last}"
    what = "is not CSV" if first == last else "are not CSV"
    return Refused("malformed row", f"{file}, {place} {what} ({error}); repair or remove it")
