"""Say what is known of videos without a decoder: which members are videos, and what may decode them."""

from typing import Literal

VideoBackend = Literal["auto", "pyav", "decord"]
"""What decodes videos. `auto` leaves the choice to mmoe, which takes PyAV: it showed the right frame of every video it
was tried on, and is as fast (`benchmarks/data_pipeline.py`). `decord` reads what preparation by `decord` has proven,
and refuses the rest by name."""

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")


def is_video(name: str) -> bool:
    """Return True if a member of this name is a video; other VISION members are still images."""
    return name.lower().endswith(VIDEO_SUFFIXES)
