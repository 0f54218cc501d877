"""Reads plain text: ``.txt`` cut into documents, and tables with one document a row (see `tables`).

A ``.txt`` may be compressed (``.gz``, ``.zst``) as tables may. Every file is one recording. A ``.txt`` is cut at
paragraph borders, else line ends, else sentences, else characters, so that no document is longer than `max_bytes`;
joined in order, the documents are the file byte for byte (CRLF included) but for a byte order mark. Only UTF-8 is
read: anything else is refused with the byte where it fails. Files of other kinds are refused, so that they are counted.
"""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from mmoe.config.base import Config
from mmoe.preparation.sources import files, ranges
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.documents import ListedDocument, ListedDocuments, document_items
from mmoe.preparation.sources.jsonl import BOM, check_utf16, decode_text, encode_text, text_of
from mmoe.preparation.sources.tables import (
    SUFFIXES,
    TableRow,
    check_columns,
    check_text,
    list_rows,
    suggest_text,
)
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment

# From the best border to the worst: each pattern's end is a place to cut.
_BORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        rb"\n\r?\n",
        rb"\n",
        rb"[.!?] |" + "|".join("。！？").encode(),  # noqa: RUF001  # the marks of Chinese and Japanese
        rb"[ \t]|" + "、|　".encode(),
    )
)


class TextColumns(Config):
    """Says which column of a table is the text."""

    text: str = "text"  # one document a row


class TextReaderConfig(Config):
    """Says how documents are found in text files and tables."""

    max_bytes: int = Field(3000, ge=64)  # of one document cut from a .txt file
    columns: TextColumns = TextColumns()


def items(path: Path, config: TextReaderConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the documents of the file at `path`, or of every text file and table under the folder."""

    def rows(file: Path, stem: str) -> ListedDocuments:
        column = config.columns.text
        check_columns(file, (column,), "columns.text")
        check_text(file, column, "columns.text")
        for row in list_rows(file, stem, quarantine):
            yield ListedDocument(row.start, row.stop, partial(_row_sample, row, column))

    def texts(file: Path) -> ListedDocuments | None:
        is_text = file == path or ranges.plain_suffix(file) == ".txt"
        return _text_documents(file, config.max_bytes) if is_text else None

    return document_items(path, f".txt, {', '.join(SUFFIXES)}", rows, quarantine, texts)


def suggest(path: Path) -> dict[str, Any]:
    """Name the column with the longest text of the first table, where none is called as by default."""
    found = [path] if path.is_file() else files.listing(path, lambda key, refusal: None)
    column = suggest_text(found, (TextColumns().text,))
    return {} if column is None else {"columns": {"text": column}}


def cut_text(data: bytes, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield byte ranges [start, stop) that cover UTF-8 `data`, each of at most `max_bytes`, ending at the best border.

    A border is taken in the second half of what fits, so that documents are at least half full.
    """
    start = 0
    while start < len(data):
        stop = min(start + max_bytes, len(data))
        if stop < len(data):
            half = start + max_bytes // 2
            ends = (max((m.end() for m in border.finditer(data, half, stop)), default=None) for border in _BORDERS)
            stop = next((end for end in ends if end is not None), _character_start(data, stop))
        yield start, stop
        start = stop


def _character_start(data: bytes, at: int) -> int:
    while data[at] & 0xC0 == 0x80:  # a continuation byte
        at -= 1
    return at


def _text_documents(file: Path, max_bytes: int) -> ListedDocuments:
    """In two passes, since a file that is not UTF-8 gives nothing; of either, only a block is in memory."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with ranges.open_stream(file) as stream:
        while block := stream.read(ranges.STREAM_BLOCK):
            if at == 0:
                check_utf16(block, file)
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:  # it begins with what was left of the block before
                left = len(error.object) - len(block)
                decode_text(error.object, file, at - left)
            at += len(block)
        ending = decoder.getstate()[0]
        decode_text(ending, file, at - len(ending))
    with ranges.open_stream(file) as stream:
        rest = stream.read(ranges.STREAM_BLOCK)
        at = len(BOM) if rest.startswith(BOM) else 0
        rest = rest[at:]
        while True:
            block = stream.read(ranges.STREAM_BLOCK)
            rest += block
            done = 0
            for start, stop in cut_text(rest, max_bytes):
                if block and stop + max_bytes > len(rest):
                    break  # where this document ends depends on what follows
                yield ListedDocument(at + start, at + stop, partial(_text_sample, file, at + start, at + stop))
                done = stop
            at, rest = at + done, rest[done:]
            if not block:
                return


def _text_sample(file: Path, start: int, stop: int, key: str, recording: str) -> Sample:
    return _sample(key, recording, decode_text(ranges.read_range(file, start, stop), file, start), str(file))


def _row_sample(row: TableRow, column: str, key: str, recording: str) -> Sample:
    return _sample(key, recording, text_of(row.load((column,)), column, row.where), row.where)


def _sample(key: str, recording: str, text: str, where: str) -> Sample:
    if not text.strip():
        raise Refused("empty text", f"{where}: document {key} holds only white space; remove it")
    return Sample(key, recording, {"txt": encode_text(text, where)}, [Segment(Modality.TEXT, "txt", text=text)])


SOURCE = Source(kind="text", clock="none", skew_budget_ns=0, config=TextReaderConfig, items=items, suggest=suggest)
