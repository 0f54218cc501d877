"""Finds what describes the files of a folder, whichever way it was written down.

=============================== ================================================================================
what describes the files        rows
=============================== ================================================================================
our own ``.jsonl`` in the root  as the reader has them
``metadata.jsonl``, ``.csv``    a column ``file_name``, relative to the table, which may stand in any folder: the
                                imagefolder and audiofolder of Hugging Face's datasets
``metadata.csv`` with ``|``     ``id|text`` or ``id|text|normalized text``, no head, and ``wavs/<id>.wav``: LJSpeech
a ``.txt`` beside each file     its content: ``0001.jpg``, ``0001.txt``
any other tables                as `tables` reads them, with a column of paths relative to the table, or of the bytes
                                themselves: Hugging Face's parquet and `save_to_disk`, CSV
=============================== ================================================================================

The first of them that is there is taken; what the others would say is listed with the files that nothing describes.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmoe.errors import DataError
from mmoe.preparation.sources import files, jsonl, ranges, tables
from mmoe.preparation.sources.base import Refuse, Refused
from mmoe.preparation.sources.columnar import Cell

_NUMBERS = ("samples", "sample_rate", "take")  # columns of CSV that are whole numbers to a reader
_DIGITS = re.compile("[0-9]{1,18}")

DescribedRows = Iterator[tuple[str, str, dict[str, Any]]]  # the place of a row, the key that it has by it, the row


@dataclass(frozen=True)
class RowForm:
    """Says how a reader's rows are written: in the file `own`, with the image or audio clip in `field`.

    In other tables it may stand in ``file_name`` instead, or in the column `given` by the user alone. `texts` are the
    columns that its text may stand in, all of which must be there where they are `exact`, given by the user; `more` are
    those of other things that the reader asks for. `suffixes` are those of the files that may have a ``.txt`` beside
    them, in lower case. `options` names what sets `given` and `texts`.
    """

    own: str
    field: str
    texts: tuple[str, ...]
    suffixes: tuple[str, ...]
    options: tuple[str, str]
    more: tuple[str, ...] = ()
    given: str | None = None
    exact: bool = False

    def asked(self, media: str | None, texts: tuple[str, ...] | None) -> "RowForm":
        """Return the form with the columns that a user gives; None: as it is."""
        return replace(self, given=media, texts=texts or self.texts, exact=texts is not None)


@dataclass(frozen=True)
class Described:
    """Holds the rows that describe images or audio clips, with their places and keys, and the files of the rows.

    A row has a path in its reader's field, relative to the folder that was searched, or the `Cell` of the bytes.
    """

    rows: DescribedRows
    tables: frozenset[Path]


class DescribedKeys(files.FileKeys):
    """Gives every sample of described rows its key and recording; `named` are the files that something is said of.

    The files of the rows themselves are among them. Paths of rows are relative to `root`.
    """

    def __init__(self, root: Path, described: Described) -> None:
        super().__init__()
        self._root, self.named = root, set(described.tables)

    def described(self, where: str, row_key: str, row: dict[str, Any], field: str) -> tuple[str, str]:
        """Return key and recording of the first sample of a row; raise `Refused` where its `field` names nothing."""
        value = row.get(field)
        if isinstance(value, Cell):
            self.named |= {value.named} if value.named else set()
            return self.cell_key(value.key, value.named)
        name = files.below(self._root, jsonl.name_of(row, field, where))
        self.named.add(self._root / name)
        return self.row_key(row_key, name)


def find_description(root: Path, found: list[Path], form: RowForm, quarantine: Refuse) -> Described:
    """Find what describes the files `found` below `root`; raise DataError, naming what would, where nothing does."""
    own = root / form.own
    if own.is_file():
        return Described(_own(own, form, quarantine), frozenset([own]))
    named = [file for file in found if file.name.lower() in ("metadata.jsonl", "metadata.csv")]
    with_lines = {file.parent for file in named if file.suffix.lower() == ".jsonl"}
    metadata = [file for file in named if file.suffix.lower() == ".jsonl" or file.parent not in with_lines]
    if metadata:
        return Described(_described(metadata, root, form, quarantine), frozenset(metadata))
    texts = {file.with_suffix(""): file for file in found if file.suffix.lower() == ".txt"}
    pairs = [(file, texts[file.with_suffix("")]) for file in found if _is_described(file, form, texts)]
    if pairs:
        return Described(_beside(pairs, root, form, quarantine), frozenset(text for _, text in pairs))
    stored = tables.find_tables(found, root, quarantine)
    if stored.tables:
        others = sorted(stored.tables)
        return Described(_described(others, root, form, quarantine), stored.tables | stored.described)
    raise DataError(
        f"{root} holds neither {form.own} nor metadata.jsonl or metadata.csv with a column file_name, nor a .txt "
        f"beside any {form.field} file, nor another table ({', '.join(tables.SUFFIXES)}): nothing says what is in "
        "them; write one of these"
    )


def describe_table(table: Path, form: RowForm, quarantine: Refuse) -> Described:
    """Read the rows of one table, whatever it is called; raise DataError for a file that is none."""
    if not tables.is_table(table):
        raise DataError(f"{table} is no table ({', '.join(tables.SUFFIXES)}); give one, or a folder")
    return Described(_described([table], table.parent, form, quarantine), frozenset([table]))


def _own(own: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    try:
        _check_columns(own, (form.given or form.field,), form)
    except Refused as refusal:
        raise DataError(str(refusal)) from None
    stem = tables.table_stem(own, own.parent)
    for number, (where, row) in enumerate(jsonl.rows(own, quarantine)):
        key = f"{stem}-{number:06d}"
        if form.given is None:
            yield where, key, row
            continue
        try:
            yield where, key, {**row, form.field: jsonl.text_of(row, form.given, where)}
        except Refused as refusal:
            quarantine(where, refusal)


def _check_columns(table: Path, media: tuple[str, ...], form: RowForm) -> None:
    """Raise `Refused` where a table lacks the image or audio clip, or what is said of it."""
    tables.check_columns(table, media, form.options[0])
    for wanted in [(name,) for name in form.texts] if form.exact else [form.texts]:
        tables.check_columns(table, wanted, form.options[1])


def _is_described(file: Path, form: RowForm, texts: dict[Path, Path]) -> bool:
    return file.suffix.lower() in form.suffixes and file.with_suffix("") in texts


def _beside(pairs: list[tuple[Path, Path]], root: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    for file, text in pairs:
        try:
            content = jsonl.decode_text(files.read_bytes(text, str(root)), text, 0).strip()
        except Refused as refusal:
            quarantine(text.relative_to(root).as_posix(), refusal)
            continue
        key = text.relative_to(root).as_posix()
        yield str(text), key, {form.field: file.relative_to(root).as_posix(), form.texts[0]: content}


def _described(given: list[Path], root: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    """The rows of tables; those that lack a column are refused, and where all do that is the error."""
    lacking: list[tuple[str, Refused]] = []
    any_row = False
    for table in given:
        place = table.relative_to(root).as_posix()
        try:
            read = _ljspeech(table, root, form, quarantine) if _is_ljspeech(table, form) else None
            for described in read or _table(table, root, form, quarantine):
                any_row = True
                yield described
        except Refused as refusal:
            if refusal.reason == tables.NO_COLUMN:
                lacking.append((place, refusal))
            else:
                quarantine(place, refusal)
        except DataError as error:
            quarantine(place, Refused("unreadable file", str(error)))
        except OSError as error:
            message = f"{table} cannot be read ({error}); restore it or remove it"
            quarantine(place, Refused("unreadable file", message))
    if lacking and not any_row:
        raise DataError(str(lacking[0][1]))
    for place, why in lacking:
        quarantine(place, why)


def _table(table: Path, root: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    names = tables.column_names(table)
    known: tuple[str, ...] = ("file_name", form.field)
    if form.given is not None:
        known = (form.given,)
    elif tables.is_columnar(table):
        known = (form.field, "file_name")  # a table that holds the bytes may say besides what they were called
    _check_columns(table, known, form)
    media = next((name for name in known if names is None or name in names), known[0])
    folder = table.parent.relative_to(root).as_posix()
    stem = tables.table_stem(table, root)
    rows = tables.light_rows(table, stem, media, (*form.texts, *form.more), quarantine)
    for number, (where, row) in enumerate(rows):
        column = next((name for name in known if name in row), known[-1])
        try:
            value = row[column] if isinstance(row.get(column), Cell) else _joined(folder, row, column, where)
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        if names is not None and ranges.plain_suffix(table) in tables.DELIMITED:
            row = {name: _value(name, cell) for name, cell in row.items()}
        yield where, f"{stem}-{number:06d}", {**row, form.field: value}


def _joined(folder: str, row: dict[str, Any], column: str, where: str) -> str:
    return posixpath.join(folder, jsonl.text_of(row, column, where))


def _value(column: str, cell: Any) -> Any:
    return int(cell) if column in _NUMBERS and _DIGITS.fullmatch(cell) else cell


def _is_ljspeech(table: Path, form: RowForm) -> bool:
    """Tell whether a table has no head, and lies beside the folder that its ids name files in."""
    if table.name.lower() != "metadata.csv" or not (table.parent / "wavs").is_dir():
        return False
    with files.open_regular(table) as stream:
        cells = stream.readline(1 << 16).decode("utf-8", "replace").lstrip("\ufeff").strip().split("|")
    return len(cells) > 1 and not {"file_name", form.given or form.field}.intersection(cells)


def _ljspeech(table: Path, root: Path, form: RowForm, quarantine: Refuse) -> DescribedRows:
    text = jsonl.decode_text(files.read_regular(table), table, 0)
    wavs = table.parent / "wavs"
    clips = {file.stem: file for file in sorted(wavs.iterdir()) if file.suffix.lower() in form.suffixes}
    stem = tables.table_stem(table, root)
    for number, line in enumerate(text.split("\n"), start=1):  # a line of text may hold other breaks
        where, key, cells = f"{table}, line {number}", f"{stem}-line-{number}", line.rstrip("\r").split("|")
        if not line.strip():
            continue
        if len(cells) not in (2, 3) or cells[0] not in clips:
            why = f"names no file in {wavs}" if len(cells) in (2, 3) else "is not id|text|normalized text"
            quarantine(key, Refused("malformed row", f"{where} {why}; repair or remove it"))
            continue
        yield where, key, {form.field: clips[cells[0]].relative_to(root).as_posix(), form.texts[0]: cells[-1]}
