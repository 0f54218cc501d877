"""Plain text: ``.txt`` files cut into documents, and ``.jsonl`` files with one document a line.

Every file is one recording. A ``.txt`` is cut at paragraph borders, else line ends, else sentences, else
characters, so that no document is longer than `max_bytes`; joined in order, the documents are the file byte for
byte (CRLF included). Only UTF-8 is read: anything else is refused with the byte where it fails.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.sample import Modality, Sample, Segment
from mmoe.data.sources.base import Item, Quarantine, Refused, Source
from mmoe.data.sources.jsonl import decode, encode_text, parse_row, text_of
from mmoe.errors import DataError

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
    field: str = "text"  # of a .jsonl line


def items(path: Path, config: TextReaderConfig, quarantine: Quarantine) -> Iterator[Item]:
    """Documents of the file at `path`, or of every .txt and .jsonl file under the folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    root = path.parent if path.is_file() else path
    for file in files:
        recording = file.relative_to(root).as_posix()
        stem = re.sub(r"\.", "_", recording.removesuffix(file.suffix))
        data = file.read_bytes()
        if file.suffix == ".jsonl":
            pieces, make = _lines(data), _jsonl_sample
        else:
            try:
                decode(data, file, 0)
            except Refused as refusal:
                quarantine(stem, refusal)
                continue
            pieces, make = cut(data, config.max_bytes), _text_sample
        for number, (start, stop) in enumerate(pieces):
            key = f"{stem}-{number:06d}"
            call = partial(make, file, key, recording, start, stop, config)
            yield Item(key, recording, call, start=start, stop=stop)


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


def _lines(data: bytes) -> Iterator[tuple[int, int]]:
    return (match.span() for match in re.finditer(rb"[^\r\n]+", data))


def _text_sample(file: Path, key: str, recording: str, start: int, stop: int, config: TextReaderConfig) -> Sample:
    return _sample(key, recording, decode(_read(file, start, stop), file, start), str(file))


def _jsonl_sample(file: Path, key: str, recording: str, start: int, stop: int, config: TextReaderConfig) -> Sample:
    where = f"{file}, byte {start}"
    row = parse_row(decode(_read(file, start, stop), file, start), where)
    return _sample(key, recording, text_of(row, config.field, where), where)


def _sample(key: str, recording: str, text: str, where: str) -> Sample:
    if not text.strip():
        raise Refused("empty text", f"{where}: document {key} holds only white space; remove it")
    return Sample(key, recording, {"txt": encode_text(text, where)}, [Segment(Modality.TEXT, "txt", text=text)])


def _read(file: Path, start: int, stop: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); restore it and prepare again") from error


SOURCE = Source(kind="text", clock="none", skew_budget_ns=0, config=TextReaderConfig, items=items)
