"""Folders described by a ``.jsonl`` file: its rows, and the fields readers need of them."""

import json
from collections.abc import Iterator
from os.path import splitext
from pathlib import Path
from typing import Any

from mmoe.data.sources.base import Quarantine, Refused
from mmoe.errors import DataError


def rows(path: Path, quarantine: Quarantine) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every line of the file that holds a JSON object; other lines are refused.

    Raises DataError when the file does not exist.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); a folder of this kind needs it, one JSON object a line"
        ) from error
    offset = 0
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, parse_row(decode(line, path, offset), where)
        except Refused as refusal:
            quarantine(f"{path.stem}-line-{number}", refusal)
        offset += len(line) + 1


def parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Refused("malformed row", f"{where} is not JSON ({error}); repair or remove the line") from error
    if not isinstance(row, dict):
        raise Refused("malformed row", f"{where} is a JSON {type(row).__name__}, not an object; repair or remove it")
    return row


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The string in `field`, not blank."""
    if not isinstance(row.get(field), str):
        found = "is missing" if field not in row else f"is {row[field]!r}, not a string"
        raise Refused("malformed row", f"{where}: {field!r} {found}; repair or remove the line")
    if not row[field].strip():
        raise Refused("empty text", f"{where}: {field!r} is blank; give it a text or remove the line")
    return row[field]


def encode_text(text: str, where: str) -> bytes:
    """UTF-8. Refuses lone surrogates, which JSON escapes can spell but no text holds."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        message = f"{where}: character {error.start} is half of a surrogate pair; repair the escape in the file"
        raise Refused("text is not UTF-8", message) from error


def decode(data: bytes, file: Path | str, offset: int) -> str:
    """UTF-8 `data` that stands at byte `offset` of `file`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        message = f"{file}: byte {byte} (0x{data[error.start]:02x}) is not UTF-8; convert the file to UTF-8"
        raise Refused("text is not UTF-8", message) from error


def read_file(folder: Path, row: dict[str, Any], field: str, where: str) -> bytes:
    """The bytes of the file that `row[field]` names, relative to `folder`."""
    return read_bytes(folder / text_of(row, field, where), where)


def read_bytes(path: Path, where: str) -> bytes:
    """The bytes of the file that `where` names."""
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}), named by {where}; restore the file or remove the line"
        raise Refused("missing file", message) from error


def key_of(row: dict[str, Any], field: str, where: str) -> str:
    """A sample's key: the path that `row[field]` gives, without the suffix."""
    return splitext(text_of(row, field, where))[0]
