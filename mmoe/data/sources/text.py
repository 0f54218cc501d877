"""Plain text: ``.txt`` cut into documents, ``.jsonl`` with one document a line, ``.parquet`` with one a row.

``.txt`` and ``.jsonl`` may be compressed (``.gz``, ``.zst``). Every file is one recording. A ``.txt`` is cut at
paragraph borders, else line ends, else sentences, else characters, so that no document is longer than `max_bytes`;
joined in order, the documents are the file byte for byte (CRLF included). Only UTF-8 is read: anything else is
refused with the byte where it fails.

A document is a byte range of the decompressed file. A compressed file cannot be entered in its middle, so each
process keeps the last one open (`_Forward`) and reads on from where it stands: as preparation makes documents in
the order of the list, every process decompresses a file once, in constant memory. Of parquet files, each process
keeps the text column of the last row group.
"""

import io
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.sample import Modality, Sample, Segment
from mmoe.data.sources.base import Item, Quarantine, Refused, Source
from mmoe.data.sources.jsonl import decode, encode_text, parse_row, text_of
from mmoe.errors import DataError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_SUFFIX = re.compile(r"(\.txt|\.jsonl)(\.gz|\.zst)?$|(\.parquet)$")

# From the best border to the worst: each pattern's end is a place to cut.
_BORDERS = tuple(
    re.compile(pattern)
    for pattern in (
        rb"\n\r?\n",
        rb"\n",
        rb"[.!?] |" + "|".join("。！？").encode(),
        rb"[ \t]|" + "、|　".encode(),
    )
)


class TextReaderConfig(Config):
    max_bytes: int = Field(3000, ge=64)  # of one document cut from a .txt file
    field: str = "text"  # of a .jsonl line, or the column of a .parquet file


def items(path: Path, config: TextReaderConfig, quarantine: Quarantine) -> Iterator[Item]:
    """Documents of the file at `path`, or of every text file under the folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _SUFFIX.search(p.name))
    root = path.parent if path.is_file() else path
    for file in files:
        recording = file.relative_to(root).as_posix()
        stem = re.sub(r"\.", "_", _SUFFIX.sub("", recording))
        list_documents = _LISTS.get(_kind(file), _text_documents)
        number = -1
        try:
            for number, (start, stop, make) in enumerate(list_documents(file, config)):
                key = f"{stem}-{number:06d}"
                yield Item(key, recording, partial(make, key, recording, config), start=start, stop=stop)
        except (OSError, pa.ArrowException) as error:
            message = (
                f"{file} cannot be read after document {number} ({error}); it is truncated or not what its name says: "
                "restore it or remove it"
            )
            quarantine(stem, Refused("unreadable file", message))
        except Refused as refusal:
            quarantine(stem, refusal)


def cut(data: bytes, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, stop) that cover UTF-8 `data`, each of at most `max_bytes`, ending at the best border.

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
    return file.with_suffix("").suffix if file.suffix in _COMPRESSION else file.suffix


# What a file holds: extent [start, stop) in it, and the call that makes the document once its key is known.
_Documents = Iterator[tuple[int, int, partial]]


def _text_documents(file: Path, config: TextReaderConfig) -> _Documents:
    with _open(file) as stream:
        data = stream.read()
    decode(data, file, 0)
    for start, stop in cut(data, config.max_bytes):
        yield start, stop, partial(_text_sample, file, start, stop)


def _line_documents(file: Path, config: TextReaderConfig) -> _Documents:
    at = 0
    with _open(file) as stream:
        for line in stream:
            if content := line.strip(b"\r\n"):
                start = at + line.index(content)
                yield start, start + len(content), partial(_line_sample, file, start, start + len(content))
            at += len(line)


def _row_documents(file: Path, config: TextReaderConfig) -> _Documents:
    with pq.ParquetFile(file) as table:
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
    return _sample(key, recording, decode(_read(file, start, stop), file, start), str(file))


def _line_sample(file: Path, start: int, stop: int, key: str, recording: str, config: TextReaderConfig) -> Sample:
    where = f"{file}, byte {start}"
    row = parse_row(decode(_read(file, start, stop), file, start), where)
    return _sample(key, recording, text_of(row, config.field, where), where)


def _row_sample(file: Path, group: int, row: int, key: str, recording: str, config: TextReaderConfig) -> Sample:
    where = f"{file}, row group {group}, row {row}"
    try:
        text = _column(file, group, config.field)[row].as_py()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        message = f"{where} cannot be read ({error}); the file is damaged: restore it or remove it"
        raise Refused("unreadable file", message) from error
    if text is None:
        raise Refused("empty text", f"{where}: {config.field!r} is null; give it a text or remove the row")
    return _sample(key, recording, text, where)


def _sample(key: str, recording: str, text: str, where: str) -> Sample:
    if not text.strip():
        raise Refused("empty text", f"{where}: document {key} holds only white space; remove it")
    return Sample(key, recording, {"txt": encode_text(text, where)}, [Segment(Modality.TEXT, "txt", text=text)])


def _read(file: Path, start: int, stop: int) -> bytes:
    try:
        if file.suffix in _COMPRESSION:
            return _forward(file).read(start, stop)
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); restore it and prepare again") from error


def _open(file: Path) -> io.BufferedReader:
    """The decompressed file from its beginning."""
    compression = _COMPRESSION.get(file.suffix)
    if compression is None:
        return file.open("rb")
    return io.BufferedReader(pa.input_stream(str(file), compression=compression), 1 << 20)


class _Forward:
    """Byte ranges of a compressed file; cheap as long as they are asked for in order."""

    def __init__(self, file: Path):
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
    with pq.ParquetFile(file) as table:
        return table.read_row_group(group, columns=[field])[field]


SOURCE = Source(kind="text", clock="none", skew_budget_ns=0, config=TextReaderConfig, items=items)
