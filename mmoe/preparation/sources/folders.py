"""Finds what describes the files of a folder, whichever way it was written down.

=============================== ================================================================================
what describes the files        rows
=============================== ================================================================================
our own ``.jsonl`` in the root  as the reader has them
``metadata.jsonl``, ``.csv``    a column ``file_name``, relative to the table, which may stand in any folder: the
                                imagefolder and audiofolder of Hugging Face's datasets
``metadata.csv`` with ``|``     ``id|text`` or ``id|text|normalized text``, no head, and ``wavs/<id>.wav``: LJSpeech
a ``.txt`` beside each file     its content: ``0001.jpg``, ``0001.txt``
=============================== ================================================================================

The first of them that is there is taken; what the others would say is listed with the files that nothing describes.
"""

import csv
import io
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.errors import DataError
from mmoe.preparation.sources import files, jsonl
from mmoe.preparation.sources.base import Refuse, Refused
from mmoe.schema.bounds import bounds

_NUMBERS = ("samples", "sample_rate", "take")  # columns of CSV that are whole numbers to a reader
_DIGITS = re.compile("[0-9]{1,18}")

DescribedRows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class RowForm:
    """Says how a reader's rows are written: in the file `own`, with the path in `field` and its text in `texts[0]`.

    In tables of others the first of the columns `texts` that a row has is its text. `suffixes` are those of the files
    that may have a ``.txt`` beside them, in lower case.
    """

    own: str
    field: str
    texts: tuple[str, ...]
    suffixes: tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """Holds the rows that describe files of a folder, with their places, and the files that the rows stand in."""

    rows: DescribedRows
    tables: frozenset[Path]


def find_description(root: Path, found: list[Path], form: RowForm, quarantine: Refuse) -> Described:
    """Find what describes the files `found` below `root`; raise DataError, naming what would, where nothing does."""
    if (own := root / form.own).is_file():
        return Described(jsonl.rows(own, quarantine), frozenset([own]))
    named = [file for file in found if file.name.lower() in ("metadata.jsonl", "metadata.csv")]
    with_lines = {file.parent for file in named if file.suffix.lower() == ".jsonl"}
    tables = [file for file in named if file.suffix.lower() == ".jsonl" or file.parent not in with_lines]
    if tables:
        rows = (row for table in tables for row in _table(table, root, found, form, quarantine))
        return Described(rows, frozenset(tables))
    texts = {file.with_suffix(""): file for file in found if file.suffix.lower() == ".txt"}
    pairs = [(file, texts[file.with_suffix("")]) for file in found if _is_described(file, form, texts)]
    if pairs:
        return Described(_beside(pairs, root, form, quarantine), frozenset(text for _, text in pairs))
    raise DataError(
        f"{root} holds neither {form.own} nor metadata.jsonl or metadata.csv with a column file_name, nor a .txt "
        f"beside any {form.field} file: nothing says what is in them; write one of these"
    )


def _is_described(file: Path, form: RowForm, texts: dict[Path, Path]) -> bool:
    return file.suffix.lower() in form.suffixes and file.with_suffix("") in texts


def _beside(pairs: list[tuple[Path, Path]], root: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    for file, text in pairs:
        try:
            content = jsonl.decode_text(files.read_bytes(text, str(root)), text, 0).strip()
        except Refused as refusal:
            quarantine(text.relative_to(root).as_posix(), refusal)
            continue
        yield str(text), {form.field: file.relative_to(root).as_posix(), form.texts[0]: content}


def _table(table: Path, root: Path, found: list[Path], form: RowForm, quarantine: Refuse) -> DescribedRows:
    if table.suffix.lower() == ".jsonl":
        read = jsonl.rows(table, quarantine)
    else:
        read = _csv(table, root, found, form, quarantine)
    folder = table.parent.relative_to(root).as_posix()
    for where, row in read:
        column = form.field if form.field in row and "file_name" not in row else "file_name"
        try:
            name = posixpath.join(folder, jsonl.text_of(row, column, where))
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        text = next((row[column] for column in form.texts if row.get(column) is not None), None)
        yield where, {**row, form.field: name, **({} if text is None else {form.texts[0]: text})}


def _csv(table: Path, root: Path, found: list[Path], form: RowForm, quarantine: Refuse) -> DescribedRows:
    try:
        text = jsonl.decode_text(files.read_regular(table), table, 0)
    except (OSError, Refused) as error:
        raise DataError(f"{table} cannot be read ({error}); repair it") from error
    head = text.partition("\n")[0]
    if "file_name" not in head and "|" in head:
        yield from _ljspeech(table, text, root, found, form, quarantine)
        return
    csv.field_size_limit(bounds().row_bytes)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    place = table.relative_to(root).as_posix()
    try:
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if None in row or None in row.values():
                message = f"{where} has not as many cells as the head; repair or remove it"
                quarantine(f"{place}-line-{reader.line_num}", Refused("malformed row", message))
            else:
                yield where, {name: _value(name, cell) for name, cell in row.items() if cell}
    except csv.Error as error:
        message = f"{table}, line {reader.line_num} is not CSV ({error}), and nothing after it is read; repair it"
        quarantine(f"{place}-line-{reader.line_num}", Refused("malformed row", message))


def _value(column: str, cell: str) -> str | int:
    return int(cell) if column in _NUMBERS and _DIGITS.fullmatch(cell) else cell


def _ljspeech(
    table: Path, text: str, root: Path, found: list[Path], form: RowForm, quarantine: Refuse
) -> DescribedRows:
    wavs = table.parent / "wavs"
    clips = {file.stem: file for file in found if file.suffix.lower() in form.suffixes and file.parent == wavs}
    place = table.relative_to(root).as_posix()
    for number, line in enumerate(text.split("\n"), start=1):  # a line of text may hold other breaks
        where, cells = f"{table}, line {number}", line.rstrip("\r").split("|")
        if not line.strip():
            continue
        if len(cells) not in (2, 3) or cells[0] not in clips:
            why = f"names no file in {wavs}" if len(cells) in (2, 3) else "is not id|text|normalized text"
            quarantine(f"{place}-line-{number}", Refused("malformed row", f"{where} {why}; repair or remove it"))
            continue
        yield where, {form.field: clips[cells[0]].relative_to(root).as_posix(), form.texts[0]: cells[-1]}
