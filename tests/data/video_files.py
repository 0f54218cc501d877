"""Sixty videos of many codecs, containers and structures whose every frame shows its number."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.data.recordings import video

RATE, FRAMES = 25, 30  # frames a second, frames of a video before it is cut
_HEIGHT, _WIDTH, _BLOCK = 80, 96, 16


def numbered(count: int = FRAMES, first: int = 0) -> np.ndarray:
    """Images [count, 80, 96, 3] u8: blocks of a bit of their number each, white or black."""
    images = np.full((count, _HEIGHT, _WIDTH, 3), 16, np.uint8)
    for number, image in enumerate(images, start=first):
        for bit in range(16):
            rows, columns = _block(bit, 0)
            image[rows, columns] = 235 if number >> bit & 1 else 16
    return images


def number_of(image: np.ndarray) -> int:
    """The number that an image [80, 96, 3] shows."""
    return sum(1 << bit for bit in range(16) if image[_block(bit, 4)].mean() > 128)


def _block(bit: int, margin: int) -> tuple[slice, slice]:
    return tuple(slice(at * _BLOCK + margin, (at + 1) * _BLOCK - margin) for at in divmod(bit, 4))


def skip_head(mp4: bytes, skip: int, keep: int) -> bytes:
    """The mp4 with its edit list made to begin `skip` frames later and to show `keep`."""
    at = mp4.index(b"elst") + 4  # version and flags, number of entries, then duration, time in the media, rate
    entries = struct.unpack(">I", mp4[at + 4 : at + 8])[0]
    last = at + 8 + 12 * (entries - 1)
    start, rate = struct.unpack(">iI", mp4[last + 4 : last + 12])
    scale = {
        box: struct.unpack(">I", mp4[(place := mp4.index(box)) + 16 : place + 20])[0] for box in (b"mvhd", b"mdhd")
    }
    entry = struct.pack(">IiI", keep * scale[b"mvhd"] // RATE, start + skip * scale[b"mdhd"] // RATE, rate)
    return mp4[:last] + entry + mp4[last + 12 :]


@dataclass(frozen=True)
class VideoFile:
    """A video by its file name; `first` is the number its first frame shows, `write` gives its bytes."""

    name: str
    write: Callable[[], bytes]
    first: int = 0

    def save(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.write())
        return path


_MUXERS = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "avi": "avi", "webm": "webm", "ts.mp4": "mpegts"}
_X265 = "log-level=none:scenecut=0"

# name of the structure -> options of the encoder
_H264 = {
    "plain": {"g": 12, "bf": 0},
    "b": {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"},
    "pyramid": {"x264-params": "keyint=15:min-keyint=15:scenecut=0:bframes=5:b-adapt=0:b-pyramid=normal"},
    "open": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"},
    "refresh": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"},
    "intra": {"g": 1},
    "one": {"bf": 2},
}
_HEVC = {
    "open": {"x265-params": f"{_X265}:keyint=12:min-keyint=12:bframes=4"},
    "closed": {"x265-params": f"{_X265}:keyint=12:min-keyint=12:open-gop=0:bframes=3"},
    "two": {"x265-params": f"{_X265}:keyint=2:min-keyint=2"},
    "plain": {"x265-params": f"{_X265}:keyint=12:min-keyint=12:bframes=0"},
}
_MPEG2 = {
    "open": {"g": 12, "bf": 2},
    "closed": {"g": 12, "bf": 2, "flags": "+cgop", "sc_threshold": 10**9},
    "plain": {"g": 6, "bf": 0},
}
_MPEG4 = {"plain": {"g": 12, "bf": 0}, "b": {"g": 12, "bf": 2}}
_VP9 = {"hidden": {"g": 12, "lag-in-frames": 16, "auto-alt-ref": 1, "deadline": "good", "cpu-used": 5}}
_AV1 = {"two": {"g": 2, "preset": 10}, "long": {"g": 12, "preset": 10}}


def _kind(codec: str, structures: dict[str, dict], containers: str) -> list[VideoFile]:
    found = []
    for suffix in containers.split():
        for structure, options in structures.items():
            label = codec.removeprefix("lib").replace("-", "")

            def write(options: dict = options, suffix: str = suffix) -> bytes:
                return video(numbered(), container=_MUXERS[suffix], codec=codec, **options)

            found.append(VideoFile(f"{label}_{structure}_{suffix.replace('.', '_')}.{suffix.split('.')[-1]}", write))
    return found


def _cut(codec: str, structure: str, options: dict, skip: int) -> VideoFile:
    def write() -> bytes:
        return skip_head(video(numbered(), codec=codec, **options), skip, FRAMES - skip)

    return VideoFile(f"cut{skip}_{codec.removeprefix('lib')}_{structure}.mp4", write, skip)


VIDEOS = [
    *_kind("libx264", _H264, "mp4 mkv"),
    *_kind("libx264", {name: _H264[name] for name in ("plain", "b", "open", "intra")}, "mov avi ts.mp4"),
    *_kind("libx265", _HEVC, "mp4 mkv"),
    *_kind("mpeg2video", _MPEG2, "mp4 mkv ts.mp4"),
    *_kind("mpeg4", _MPEG4, "mp4 mkv avi"),
    *_kind("libvpx-vp9", _VP9, "webm mkv mp4"),
    *_kind("libvpx", {"hidden": _VP9["hidden"]}, "webm"),
    *_kind("libsvtav1", _AV1, "mp4 mkv"),
    _cut("libx264", "plain", _H264["plain"], 3),
    _cut("libx264", "b", _H264["b"], 10),
    _cut("libx264", "open", _H264["open"], 7),
    _cut("libx265", "open", _HEVC["open"], 5),
    _cut("mpeg4", "b", _MPEG4["b"], 4),
]
