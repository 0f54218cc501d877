"""Reads plain text: ``.txt`` cut into documents, ``.jsonl`` with one document a line, ``.parquet`` with one a row.

``.txt`` and ``.jsonl`` may be compressed (``.gz``, ``.zst``). Every file is one recording. A ``.txt`` is cut at
paragraph borders, else line ends, else sentences, else characters, so that no document is longer than `max_bytes`;
joined in order, the documents are the file byte for byte (CRLF included) but for a byte order mark. Only UTF-8 is
read: anything else is refused with the byte where it fails. Files of other kinds are refused, so that they are counted.

A document is a byte range of the decompressed file. A compressed file cannot be entered in its middle, so each
process keeps the last one open (`_Forward`) and reads on from where it stands: as preparation makes documents in
the order of the list, every process decompresses a file once, in constant memory. Of parquet files, each process
keeps the text column of the last row group.
"""

import codecs
import io
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.reading import reading
from mmoe.errors import DataError, counted_as
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.files import check_name, listing, open_regular, pass_over
from mmoe.preparation.sources.jsonl import BOM, check_utf16, decode_text, encode_text, lines, parse_row, text_of
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_SUFFIX = re.compile(r"(\.txt|\.jsonl)(\.gz|\.zst)?$|(\.parquet)$", re.IGNORECASE)
_BLOCK = 1 << 20  # bytes of a file that are in memory at once

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


class TextReaderConfig(Config):
    """Says how documents are found in text files."""

    max_bytes: int = Field(3000, ge=64)  # of one document cut from a .txt file
    field: str = "text"  # of a .jsonl line, or the column of a .parquet file


def items(path: Path, config: TextReaderConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the documents of the file at `path`, or of every text file under the folder."""
    found = [path] if path.is_file() else listing(path, quarantine)
    files = {file: None for file in found if file == path or _SUFFIX.search(file.name)}
    root = path.parent if path.is_file() else path
    pass_over(
        (f for f in found if f != path and not _SUFFIX.search(f.name)), root, ".txt, .jsonl, .parquet", quarantine
    )
    for file in files:
        recording = file.relative_to(root).as_posix()
        stem = re.sub(r"\.", "_", _SUFFIX.sub("", recording))
        list_documents = _LISTS.get(_kind(file), _text_documents)
        number = -1
        try:
            check_name(recording, str(root))
            for number, (start, stop, make) in enumerate(list_documents(file, config)):
                key = f"{stem}-{number:06d}"
                yield Item(key, recording, partial(make, key, recording, config), start=start, stop=stop)
        except Refused as refusal:
            quarantine(stem, refusal)
        except (DataError, OSError, pa.ArrowException) as error:
            message = (
                f"{file} cannot be read after document {number} ({error}); it is truncated or not what its name says: "
                "restore it or remove it"
            )
            quarantine(stem, Refused("unreadable file", message))


def suggest(path: Path) -> dict[str, Any]:
    """Name the field with the longest text in the first row of the first table, where none is called as by default."""
    default = TextReaderConfig.model_fields["field"].default
    for file in [path] if path.is_file() else listing(path, lambda key, why: None):
        if row := _first_row(file):
            texts = {name: value for name, value in row.items() if isinstance(value, str)}
            return {} if default in row or not texts else {"field": max(texts, key=lambda name: len(texts[name]))}
    return {}


def _first_row(file: Path) -> dict[str, Any]:
    """The first row of a table; empty for a file that is none, or has none."""
    if _kind(file) == ".parquet":
        with reading("parquet file", str(file), "restore it or remove it"), _parquet(file) as table:
            return next((batch.to_pylist()[0] for batch in table.iter_batches(batch_size=1)), {})
    if _kind(file) == ".jsonl":
        with reading("text file", str(file), "restore it or remove it"), _open(file) as stream:
            return next((parse_row(line, file, at, str(file)) for at, line in lines(stream) if line.strip()), {})
    return {}


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


def _kind(file: Path) -> str:
    plain = file.with_suffix("") if file.suffix.lower() in _COMPRESSION else file
    return plain.suffix.lower()


# What a file holds: extent [start, stop) in it, and the call that makes the document once its key is known.
_Documents = Iterator[tuple[int, int, partial]]


def _text_documents(file: Path, config: TextReaderConfig) -> _Documents:
    """In two passes, since a file that is not UTF-8 gives nothing; of either, only a block is in memory."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(file) as stream:
        while block := stream.read(_BLOCK):
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
    with _open(file) as stream:
        rest = stream.read(_BLOCK)
        at = len(BOM) if rest.startswith(BOM) else 0
        rest = rest[at:]
        while True:
            block = stream.read(_BLOCK)
            rest += block
            done = 0
            for start, stop in cut_text(rest, config.max_bytes):
                if block and stop + config.max_bytes > len(rest):
                    break  # where this document ends depends on what follows
                yield at + start, at + stop, partial(_text_sample, file, at + start, at + stop)
                done = stop
            at, rest = at + done, rest[done:]
            if not block:
                return


def _line_documents(file: Path, config: TextReaderConfig) -> _Documents:
    with _open(file) as stream:
        for start, line in lines(stream):
            if start == len(BOM) or start == 0:
                check_utf16(line, file)
            if line:
                yield start, start + len(line), partial(_line_sample, file, start, start + len(line))


def _row_documents(file: Path, config: TextReaderConfig) -> _Documents:
    with reading("parquet file", str(file), "restore it or remove it"), _parquet(file) as table:
        schema, groups = table.schema_arrow, table.metadata.num_row_groups
        if config.field not in schema.names:
            message = f"{file} has no column {config.field!r}; set the option field to one of {', '.join(schema.names)}"
            raise Refused("no such column", message)
        kind = schema.field(config.field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            message = f"{file}: column {config.field!r} holds {kind}, not text; set the option field to a text column"
            raise Refused("no such column", message)
        rows = [table.metadata.row_group(group).num_rows for group in range(groups)]
    number = 0
    for group, count in enumerate(rows):
        for row in range(count):
            yield number, number + 1, partial(_row_sample, file, group, row)
            number += 1


_LISTS = {".jsonl": _line_documents, ".parquet": _row_documents}


def _text_sample(file: Path, start: int, stop: int, key: str, recording: str, config: TextReaderConfig) -> Sample:
    return _sample(key, recording, decode_text(_read(file, start, stop), file, start), str(file))


def _line_sample(file: Path, start: int, stop: int, key: str, recording: str, config: TextReaderConfig) -> Sample:
    where = f"{file}, byte {start}"
    row = parse_row(_read(file, start, stop), file, start, where)
    return _sample(key, recording, text_of(row, config.field, where), where)


def _row_sample(file: Path, group: int, row: int, key: str, recording: str, config: TextReaderConfig) -> Sample:
    where = f"{file}, row group {group}, row {row}"
    with counted_as("unreadable file"), reading("row", where, "the file is damaged: restore it or remove it"):
        text = _column(file, group, config.field)[row].as_py()
    if text is None:
        raise Refused("empty text", f"{where}: {config.field!r} is null; give it a text or remove the row")
    return _sample(key, recording, text, where)


def _sample(key: str, recording: str, text: str, where: str) -> Sample:
    if not text.strip():
        raise Refused("empty text", f"{where}: document {key} holds only white space; remove it")
    return Sample(key, recording, {"txt": encode_text(text, where)}, [Segment(Modality.TEXT, "txt", text=text)])


def _read(file: Path, start: int, stop: int) -> bytes:
    try:
        if file.suffix.lower() in _COMPRESSION:
            return _forward(file).read(start, stop)
        with open_regular(file) as stream:
            stream.seek(start)
            return stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); restore it and prepare again") from error


def _open(file: Path) -> io.BufferedReader:
    """The decompressed file from its beginning."""
    compression, stream = _COMPRESSION.get(file.suffix.lower()), open_regular(file)
    if compression is None:
        return stream
    return io.BufferedReader(pa.input_stream(stream, compression=compression), _BLOCK)


def _parquet(file: Path) -> pq.ParquetFile:
    open_regular(file).close()
    return pq.ParquetFile(file)


class _Forward:
    """Byte ranges of a compressed file; cheap as long as they are asked for in order."""

    def __init__(self, file: Path) -> None:
        self._file, self._stream, self._at = file, _open(file), 0

    def read(self, start: int, stop: int) -> bytes:
        if start < self._at:
            self._stream.close()
            self._stream, self._at = _open(self._file), 0
        while self._at < start:
            passed = len(self._stream.read(min(start - self._at, 1 << 20)))
            if not passed:
                raise OSError(f"it ends at byte {self._at}")
            self._at += passed
        data = self._stream.read(stop - start)
        self._at += len(data)
        return data


_forward = lru_cache(maxsize=1)(_Forward)


@lru_cache(maxsize=1)
def _column(file: Path, group: int, field: str) -> pa.ChunkedArray:
    with _parquet(file) as table:
        return table.read_row_group(group, columns=[field])[field]


SOURCE = Source(kind="text", clock="none", skew_budget_ns=0, config=TextReaderConfig, items=items, suggest=suggest)
