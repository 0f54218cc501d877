"""Bounds what is read of one file that somebody else wrote: the table of bounds, and the one that is in force.

A small file can ask for terabytes: a header that states them, an image of one color, nested JSON. Every reader asks
`bounds()` before it allocates. The table is a context variable, because what it bounds is opened deep inside readers
and decoders, whose own arguments say what to read and not how far; preparation and the loader set it once around
their work, in every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import Field

from mmoe.config.base import Config
from mmoe.errors import Refused

BEYOND = "beyond the bounds"  # the reason of a `Refused` item


class Bounds(Config):
    """Defaults that real recordings do not meet; raise one by its key where yours do (`prepare.bounds`, `data.bounds`).

    Sizes are of one item: a file, a row, an image, a video, an audio clip, a table.
    """

    file_bytes: int = Field(8 << 30, gt=0)  # of a file that is read whole
    row_bytes: int = Field(64 << 20, gt=0)  # of a line of JSON
    json_depth: int = Field(64, gt=0)  # lists and objects inside each other
    json_digits: int = Field(400, gt=0)  # of one number
    image_pixels: int = Field(128_000_000, gt=0)  # of one image
    video_pixels: int = Field(40_000_000, gt=0)  # of a frame
    video_seconds: float = Field(7 * 86400.0, gt=0)  # of one video
    video_frames: int = Field(20_000_000, gt=0)  # of one video
    audio_seconds: float = Field(86400.0, gt=0)  # of one file
    audio_channels: int = Field(64, gt=0)  # of one file
    audio_rate: int = Field(768_000, gt=0)  # Hz
    array_bytes: int = Field(1 << 30, gt=0)  # of a table, unpacked


DEFAULT_BOUNDS = Bounds()
_bounds: ContextVar[Bounds] = ContextVar("bounds", default=DEFAULT_BOUNDS)


def bounds() -> Bounds:
    """Return the bounds in force here."""
    return _bounds.get()


@contextmanager
def bounded_by(table: Bounds) -> Iterator[None]:
    """Within the context, `bounds` gives `table`."""
    token = _bounds.set(table)
    try:
        yield
    finally:
        _bounds.reset(token)


def check_bound(key: str, found: float, where: str, what: str) -> None:
    """Raise `Refused` where `found` exceeds the bound of this key in the table in force.

    `where` names the file and `what` says what it has so much of, as a verb and its object: "has pixels".
    """
    most = getattr(bounds(), key)
    if found > most:
        message = (
            f"{where} {what}: {found:,}, the bound {key} is {most:,}; raise prepare.bounds.{key} (data.bounds.{key} "
            "in training) if that is right, or leave it out"
        )
        raise Refused(BEYOND, message)
