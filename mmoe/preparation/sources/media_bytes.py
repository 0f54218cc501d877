"""Reads the bytes of images and audio clips that rows hold: by the path of a file, in a cell, or within a value.

Hugging Face's features Image and Audio are ``{bytes, path}``: the bytes count, and where there are none the path does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.errors import brief
from mmoe.preparation.sources import files
from mmoe.preparation.sources.base import Refused
from mmoe.preparation.sources.columnar import Cell
from mmoe.schema.bounds import check_bound

_BEGIN = (  # of the formats that rows hold without a name
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"fLaC", ".flac"),
    (b"OggS", ".ogg"),
    (b"ID3", ".mp3"),
    (b"\xff\xfb", ".mp3"),
    (b"\xff\xf3", ".mp3"),
)
_RIFF = {b"WEBP": ".webp", b"WAVE": ".wav"}


@dataclass(frozen=True)
class MediaBytes:
    """Holds the bytes of an image or audio clip, its name in messages, and its suffix in lower case ("": unknown)."""

    content: bytes
    name: str
    suffix: str


def read_media(value: Any, folder: Path, where: str) -> MediaBytes:
    """Read what a row's `value` holds or names; paths are relative to `folder`. Raises `Refused`.

    A value is a path, bytes, a mapping of both, or the `Cell` of one of these, whose paths are relative to its table.
    `where` names the row in messages.
    """
    if isinstance(value, Cell):
        return read_media(value.read(), value.file.parent, where)
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        check_bound("file_bytes", len(value), where, "has too many bytes")
        return MediaBytes(value, where, _suffix(value))
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None or value == "" else brief(value)
        message = f"{where} holds {found} in place of an image or audio clip; give bytes or a path, or remove the row"
        raise Refused("malformed row", message)
    if "://" in value:
        message = f"{where} names {brief(value)}, and nothing is downloaded here; fetch it and name the file"
        raise Refused("missing file", message)
    file = folder / value
    return MediaBytes(files.read_bytes(file, where), str(file), file.suffix.lower())


def _suffix(content: bytes) -> str:
    if content[:4] == b"RIFF":
        return _RIFF.get(content[8:12], "")
    return next((suffix for begin, suffix in _BEGIN if content.startswith(begin)), "")
