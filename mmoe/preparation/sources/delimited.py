"""Reads tables of separated cells: ``.csv`` (commas; where the head has none, semicolons or bars) and ``.tsv`` (tabs).

The first line names the columns. Cells of a ``.csv`` may stand in double quotes, and then hold separators and line
breaks; in a ``.tsv`` a quote is a character like others, and every line is a row. A row that is no such row, has
another number of cells or is not UTF-8 is refused alone, with the number of its line.
"""

import csv
import io
import re
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
            lines.begin_record()
            start, line = lines.at, lines.number + 1
            cells: dict[str, str] | Refused
            try:
                found = next(reader)
            except StopIteration:
                return
            except (csv.Error, Refused) as error:  # the next call begins a row at the next line
                lines.close_quote(head)
                broken = error if isinstance(error, Refused) else _broken(file, line, lines.number, error)
                cells = lines.fault or broken
            else:
                if lines.fault is None and not found:
                    continue
                try:
                    cells = lines.fault or _cells(found, head, f"{file}, line {line}")
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
    """The decoded lines of a table, with their ends; `at` and `number` say how far they were read.

    A line that is not UTF-8 is given nevertheless, since it may be in the middle of a record; `fault` says why the
    record that it is in is to be refused.
    """

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self.at, self.number = 0, 0
        self.begin_record()

    def begin_record(self) -> None:
        """Forget the record before: the next line begins one."""
        self.fault: Refused | None = None
        self._quotes, self._last = 0, b""

    def close_quote(self, head: TableHead) -> None:
        """Pass over the rest of a broken record: the lines up to the one that closes the quote that it left open.

        The quote was never closed, and another record has begun, where a line is a whole row with quotes of its own.
        """
        if head.delimiter == "\t":
            return
        separator = re.escape(head.delimiter.encode())
        cell = rb'(?:"(?:[^"]|"")*"|[^"' + separator + rb"\r\n]*)"
        row = re.compile(cell + b"(?:" + separator + cell + b"){%d}\r?\n?" % (len(head.names) - 1))
        while self._quotes % 2 and not (b'"' in self._last and row.fullmatch(self._last)) and self._read():
            pass

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        start = self.at
        if not self._read():
            raise StopIteration
        where = f"{self._file}, line {self.number}"
        check_bound("row_bytes", len(self._last), where, "is a row of too many bytes")
        try:
            return decode_text(self._last, where if start else self._file, start)
        except Refused as refusal:
            self.fault = self.fault or refusal
            return self._last.decode("utf-8", "surrogateescape")

    def _read(self) -> bool:
        """Read the next line, of one that is too long no more than shows it; False at the end of the table."""
        most = bounds().row_bytes
        self._last = part = self._stream.readline(most + 1)
        self.number += bool(part)
        while part:
            self.at, self._quotes = self.at + len(part), self._quotes + part.count(b'"')
            if part.endswith(b"\n") or len(part) <= most:
                break
            part = self._stream.readline(most + 1)
        return bool(self._last)


def _reader(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(bounds().row_bytes)
    if delimiter == "\t":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _head(file: Path, lines: _Lines) -> TableHead:
    try:
        first = next(lines)
    except StopIteration:
        raise Refused("no such column", f"{file} is empty; its first line must name the columns") from None
    if lines.fault is not None:
        raise lines.fault
    separators = "\t" if ranges.plain_suffix(file) == ".tsv" else ",;|"
    delimiter = next((mark for mark in separators if mark in first), separators[0])
    try:
        names = next(_reader(iter([first]), delimiter))
    except (csv.Error, StopIteration) as error:
        message = f"{file}, line 1 does not name the columns ({error}); repair it"
        raise Refused("malformed row", message) from error
    if not any(name.strip() for name in names):
        raise Refused("no such column", f"{file}, line 1 is blank; it must name the columns: write them, or remove it")
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
