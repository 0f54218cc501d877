"""Reads JSON as readers find it: folders described by a ``.jsonl`` file, tables, and the fields of their rows."""

import json
import math
import mmap
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmoe.errors import DataError, brief, did_you_mean
from mmoe.preparation.sources.base import Refuse, Refused
from mmoe.preparation.sources.files import open_regular, read_regular
from mmoe.preparation.sources.ranges import open_stream
from mmoe.schema.bounds import BEYOND, bounds, check_bound

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]|[^][{},:"\s]+', re.DOTALL)
_MARK = re.compile(rb"\S")
_EXACT = 2**53  # integers beyond it are no count, number or time


def rows(path: Path, quarantine: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of every line of the file that holds a JSON object; other lines are refused.

    Raises DataError when the file cannot be read.
    """
    try:
        with open_stream(path) as stream:
            for number, (start, line) in enumerate(lines(stream), start=1):
                where = f"{path}, line {number}"
                try:
                    if line.strip():
                        yield where, parse_row(line, path, start, where)
                except Refused as refusal:
                    quarantine(f"{path.stem}-line-{number}", refusal)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); a folder of this kind needs it, one JSON object a line"
        ) from error


def lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of every line of a stream, without its end and without a byte order mark.

    Of a line beyond the bound of a row no more than one byte too many is given, for `parse` to refuse; the rest
    of it is passed over, so that no line takes more memory than that.
    """
    at, most = 0, bounds().row_bytes
    while line := stream.readline(most + 1):
        start, length = at, len(line)
        while not line.endswith(b"\n") and length > most and (rest := stream.readline(most + 1)):
            length += len(rest)
            if rest.endswith(b"\n"):
                break
        at += length
        if start == 0 and line.startswith(BOM):
            start, line = len(BOM), line[len(BOM) :]
        yield start, line.rstrip(b"\r\n")


def listed_rows(path: Path) -> Iterator[tuple[int, int]]:
    """Yield bytes [start, stop) of every item of the list that a file of JSON holds; of the file, little is in memory.

    Raises `Refused` for a file that holds something else, and after the items of one that is cut off or holds more
    behind its list; OSError.
    """
    with open_regular(path) as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise Refused("malformed row", f"{path} is empty; restore it or remove it")
        check_utf16(stream.read(64), path)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            depth, start = 0, 0
            for found in _TOKENS.finditer(content, len(BOM) * (content[: len(BOM)] == BOM)):
                mark = found[0][:1]
                if depth == 0 and mark != b"[":
                    message = f"{path} holds no list of rows; give one, or a JSON object a line as .jsonl"
                    raise Refused("malformed row", message)
                if mark in (b"[", b"{"):
                    depth += 1
                    start = found.start() if depth == 2 else start
                elif mark in (b"]", b"}"):
                    depth -= 1
                    if depth == 0:
                        if more := _MARK.search(content, found.end()):
                            message = f"{path}, byte {more.start()}: more stands behind the list, which is not read"
                            raise Refused("malformed row", f"{message}; make one list of it, or a file of each list")
                        return
                    if depth == 1:
                        yield start, found.end()
                elif depth == 1:
                    yield found.span()
    raise Refused("unreadable file", f"{path} ends within its list; it is truncated: restore it or remove it")


def parse_row(data: bytes, file: Path | str, offset: int, where: str) -> dict[str, Any]:
    """Return the JSON object that stands at byte `offset` of `file`; raise `Refused` for what is none."""
    check_bound("row_bytes", len(data), where, "is a row of too many bytes")
    row = parse(decode_text(data, file, offset), where)
    if not isinstance(row, dict):
        raise Refused("malformed row", f"{where} is a JSON {type(row).__name__}, not an object; repair or remove it")
    return row


def parse(text: str, where: str) -> Any:
    """Return what a JSON text holds; raise `Refused` for what is none, and beyond the bounds of depth and digits."""
    table = bounds()
    long = re.compile("[0-9]" + f"{{{table.json_digits + 1}}}")
    integer = real = None
    if long.search(text):  # perhaps inside a string: only then is each number looked at
        integer, real = _number(int, where), _number(float, where)
    try:
        value = json.loads(text, parse_int=integer, parse_float=real)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise Refused("malformed row", f"{where} is not JSON ({error}); repair or remove it") from error
    if text.count("[") + text.count("{") > table.json_depth and _depth(value, table.json_depth) > table.json_depth:
        raise _too_deep(where)
    return value


def _number(kind: type, where: str) -> Callable[[str], Any]:
    def convert(digits: str) -> Any:
        check_bound("json_digits", len(digits), where, "holds a number of too many digits")
        return kind(digits)

    return convert


def _depth(value: Any, most: int) -> int:
    """How many lists and objects stand inside each other, as far as one beyond `most`."""
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level and depth <= most:
        depth += 1
        held = (child for one in level for child in (one.values() if type(one) is dict else one))
        level = [child for child in held if type(child) in (dict, list)]
    return depth


def _too_deep(where: str) -> Refused:
    message = (
        f"{where} nests lists and objects deeper than the bound json_depth, {bounds().json_depth}; raise "
        "prepare.bounds.json_depth if that is right, or repair or remove it"
    )
    return Refused(BEYOND, message)


def load_json(file: Path, remedy: str) -> Any:
    """Read a file of JSON; raise DataError, with `remedy` for a file that cannot be opened."""
    try:
        data = read_regular(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    return parse(decode_text(data, file, 0), str(file))


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """Return the string in `field` of a row, not blank; raise `Refused` for anything else."""
    if field not in row:
        hint = did_you_mean(field, row) or ";"
        there = brief(", ".join(row) or "nothing", quoted=False)
        raise Refused("malformed row", f"{where}: {field!r} is missing{hint} the row has {there}; repair or remove it")
    if row[field] is None:
        raise Refused("empty text", f"{where}: {field!r} is null; give it a text or remove the line")
    if not isinstance(row[field], str):
        found = f"is {brief(row[field])}, not a string"
        raise Refused("malformed row", f"{where}: {field!r} {found}; repair or remove the line")
    if not row[field].strip():
        raise Refused("empty text", f"{where}: {field!r} is blank; give it a text or remove the line")
    return row[field]


def chosen(row: dict[str, Any], known: tuple[str, ...]) -> str:
    """Name the field of a row that is meant: the first of the `known` that says something.

    Where none does it is the first of them, which the message of a refusal will name.
    """
    return next((name for name in known if row.get(name) is not None), known[0])


def number_of(row: dict[str, Any], field: str, where: str, what: str = "a number") -> float:
    """Return the finite number in `field` of a row; NaN and Infinity, which JSON's readers take, are none.

    `what` says in the message what is wanted. Raises `Refused`.
    """
    if not is_number(row.get(field)):
        found = "is missing" if field not in row else f"is {brief(row[field])}, not {what}"
        raise Refused("malformed row", f"{where}: {field!r} {found}; repair or remove the line")
    return row[field]


def integer_of(row: dict[str, Any], field: str, where: str) -> int:
    """Return the integer in `field` of a row; raise `Refused` for anything else, and for more than 53 bits."""
    value = row.get(field)
    if type(value) is not int or abs(value) > _EXACT:
        found = "is missing" if field not in row else f"is {brief(value)}, not an integer of 53 bits"
        raise Refused("malformed row", f"{where}: {field!r} {found}; repair or remove the line")
    return value


def is_number(value: Any) -> bool:
    """Tell whether a value of JSON is a number that float64 holds."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def encode_text(text: str, where: str) -> bytes:
    """Encode a text as UTF-8; refuse lone surrogates, which JSON escapes can spell but no text holds."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        message = f"{where}: character {error.start} is half of a surrogate pair; repair the escape in the file"
        raise Refused("text is not UTF-8", message) from error


def decode_text(data: bytes, file: Path | str, offset: int) -> str:
    """Decode UTF-8 `data` that stands at byte `offset` of `file`, without a byte order mark; raise `Refused`."""
    if offset == 0:
        check_utf16(data, file)
        data, offset = (data[len(BOM) :], len(BOM)) if data.startswith(BOM) else (data, 0)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        message = f"{file}: byte {byte} (0x{data[error.start]:02x}) is not UTF-8; convert the file to UTF-8"
        raise Refused("text is not UTF-8", message) from error


def check_utf16(data: bytes, file: Path | str) -> None:
    """Refuse a file that begins as UTF-16 or UTF-32: by its mark, or by zeros in every second byte."""
    begin = data[:64]
    if begin.startswith(_UTF16) or 5 * begin.count(0) > 2 * len(begin):
        message = f"{file} is UTF-16 or UTF-32, not UTF-8; convert it, as by `iconv -f UTF-16 -t UTF-8`"
        raise Refused("text is not UTF-8", message)


def name_of(row: dict[str, Any], field: str, where: str) -> str:
    """Return the path that `row[field]` gives, in its plainest spelling: ``./a//b.png`` is ``a/b.png``."""
    return posixpath.normpath(text_of(row, field, where))
