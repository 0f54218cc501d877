"""Payloads: bytes of a picture, a video, a sound or a table -> arrays.

Every loader takes `where`, the name of the payload in messages (file or tar, and key), and raises DataError with
it for bytes that cannot be used. Nothing is guessed and no reader replaces another silently.
"""

import io
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from mmoe.backends import require
from mmoe.errors import DataError

Backend = Literal["decord", "pyav"]

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 turn the picture by a quarter
_DECORD_LONGEST_NS = 2**13 * 10**9  # decord gives float32 seconds, 1 ms apart beyond this
_SPARE = 2  # a picture is decoded at no less than twice the size it is then resized to: a filter needs neighbours
_CHEAPER_THAN_SEEKING = 16  # frames ahead that are decoded on the way


def is_video(name: str) -> bool:
    """Whether a member of this name is a video; other VISION members are still pictures."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def load_image(data: bytes, where: str, least: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright (EXIF orientation), transparent parts over white, 16 bits scaled to 8.

    `least` (height, width): a JPEG more than `_SPARE` times as large may come out at a half, a quarter or an eighth of
    its size, which its decoder gives at a fraction of the cost.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if least is not None and image.format == "JPEG":
                height, width = least[::-1] if image.getexif().get(_ORIENTATION, 1) >= 5 else least
                image.draft(image.mode, (_SPARE * width, _SPARE * height))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image, where)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("picture", where, error, "replace it with a readable PNG or JPEG, or leave it out") from error


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels of the upright picture, from its header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("picture", where, error, "replace it with a readable PNG or JPEG, or leave it out") from error
    return (width, height) if turned else (height, width)


def reduced_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int] | None:
    """The whole fraction of a frame's (height, width) that is no less than `_SPARE` times `least`; None: all of it."""
    fraction = min(side // (_SPARE * wanted) for side, wanted in zip(size, least, strict=True))
    return (size[0] // fraction, size[1] // fraction) if fraction > 1 else None


class VideoFrames:
    """Random access to the frames of one video stream: number `stream` of the file, else the best by FFmpeg's rank.

    `data` is the file's bytes, or its path, where it need not fit into memory. `times_ns` i64 [N] is each frame's
    presentation time after the stream's start, strictly increasing; `size` is (height, width) upright. Both backends
    apply a rotation tag of quarter turns. `backend` is "decord", or "pyav" for what decord cannot read (AV1, files
    without a duration, AVI with B-frames, a stream that is not the best).

    `scaled` (height, width) is what frames are scaled to as they are converted to RGB: for frames that are resized
    further down it saves most of the cost of decoding.
    """

    def __init__(
        self,
        data: bytes | Path,
        backend: Backend,
        where: str,
        stream: int | None = None,
        scaled: tuple[int, int] | None = None,
    ):
        self.where, self.backend = where, backend
        self._reader = (_DecordReader if backend == "decord" else _PyAVReader)(data, where, stream, scaled)
        self.times_ns = _checked_times(self._reader.times_ns, backend, where)

    def __len__(self) -> int:
        return len(self.times_ns)

    @cached_property
    def size(self) -> tuple[int, int]:
        return self.frames(np.array([0])).shape[1:3]

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Frames uint8 [n, H, W, 3] at `indices` [n], in presentation order; any order, repeats allowed."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise DataError(
                f"{self.where}: frames {indices.min()} to {indices.max()} are asked for, the video has {len(self)}; "
                "the index and the video do not belong together: prepare the source again"
            )
        return self._reader.frames(indices) if len(indices) else np.zeros((0, *self.size, 3), np.uint8)


class _DecordReader:
    def __init__(self, data: bytes | Path, where: str, stream: int | None, scaled: tuple[int, int] | None):
        if stream is not None:
            raise DataError(f"{where}: decord reads the best video stream only; {_try_pyav('decord')}")
        decord = require("decord", "data.video_backend")  # only here: it exists for Linux on x86-64 alone
        self._where, self._decord = where, decord
        decord.logging.set_level(self._decord.logging.QUIET)  # it prints what it then raises
        try:
            height, width = scaled or (-1, -1)
            self._video = decord.VideoReader(_file(data), width=width, height=height, num_threads=1)
            self._seconds = self._video.get_frame_timestamp(np.arange(len(self._video)))[:, 0]
        except (RuntimeError, decord.DECORDError, IndexError) as error:
            raise _unreadable("video", where, error, _try_pyav("decord")) from error

    @property
    def times_ns(self) -> np.ndarray:
        seconds = self._seconds.astype(np.float64)
        if not np.isfinite(seconds).all() or np.abs(seconds).max(initial=0) * 1e9 > _DECORD_LONGEST_NS:
            raise DataError(
                f"{self._where}: decord reports frame times beyond {_DECORD_LONGEST_NS // 10**9} s, which are garbage "
                f"or too coarse; {_try_pyav('decord')}"
            )
        return np.rint(seconds * 1e9).astype(np.int64)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        try:
            return self._video.get_batch(indices).asnumpy()
        except (RuntimeError, self._decord.DECORDError) as error:
            raise _unreadable("video", self._where, error, _try_pyav("decord")) from error


class _PyAVReader:
    def __init__(self, data: bytes | Path, where: str, stream: int | None, scaled: tuple[int, int] | None):
        self._where, self._scaled = where, scaled
        try:
            self._container = av.open(_file(data))
            streams = self._container.streams
            self._stream = streams.best("video") if stream is None else streams[stream]
            if self._stream is None:
                raise DataError(f"{where} has no video stream; give a video file or leave it out")
            self._start = self._stream.start_time or 0
            packets = self._container.demux(self._stream)
            # Packets come in decoding order, and some codecs mark ones that are never shown.
            shown = [p.pts for p in packets if p.pts is not None and not p.is_discard]
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable("video", where, error, _try_pyav("pyav")) from error
        # AVI has no presentation times: what FFmpeg gives its frames is out of order where there are B-frames. The
        # decoder's order is right, so its frames are counted from the first on, and take the times in that order.
        self._counted = self._container.format.name == "avi"
        self._pts = np.sort(np.array(shown, dtype=np.int64))
        self._index = {pts: index for index, pts in enumerate(self._pts.tolist())}
        self._decoding: Iterator[av.VideoFrame] = iter(())
        self._at = -1  # index of the last frame that `_decoding` gave
        self._converter = VideoReformatter()  # kept: it sets up its tables once a picture size

    @property
    def times_ns(self) -> np.ndarray:
        base = self._stream.time_base
        ticks = [int(t) for t in self._pts - self._start]  # Python integers: a tick times 1e9 can leave 64 bits
        return np.array([round(t * 10**9 * base.numerator / base.denominator) for t in ticks], dtype=np.int64)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        wanted = set(indices.tolist())
        found: dict[int, np.ndarray] = {}
        try:
            if self._counted:
                if self._at < 0 or min(wanted) <= self._at:
                    self._seek(self._start)
            elif not 0 < min(wanted) - self._at <= _CHEAPER_THAN_SEEKING:
                self._seek(int(self._pts[min(wanted)]))
            self._decode(wanted, found)
            if len(found) < len(wanted):  # an index may lead behind the frame that was sought
                self._seek(self._start)
                self._decode(wanted, found)
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable("video", self._where, error, _try_pyav("pyav")) from error
        if len(found) < len(wanted):
            raise DataError(
                f"{self._where}: {len(wanted - set(found))} of {len(wanted)} frames cannot be decoded, the first is "
                f"frame {min(wanted - set(found))}; {_try_pyav('pyav')}"
            )
        return np.stack([found[index] for index in indices.tolist()])

    def _seek(self, pts: int) -> None:
        self._container.seek(pts, stream=self._stream)
        self._decoding, self._at = self._container.decode(self._stream), -1

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._scaled is None:
            return self._converter.reformat(frame, format="rgb24")
        height, width = self._scaled if frame.rotation % 180 == 0 else self._scaled[::-1]
        return self._converter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC")

    def _decode(self, wanted: set[int], found: dict[int, np.ndarray]) -> None:
        for frame in self._decoding:
            index = self._at + 1 if self._counted else self._index.get(frame.pts, len(self._pts))
            if index >= len(self._pts):
                continue  # a picture that the container has no time for is not one of its frames
            self._at = index
            if self._at in wanted and self._at not in found:
                found[self._at] = np.rot90(self._convert(frame).to_ndarray(), frame.rotation // 90)
            if len(found) == len(wanted):
                return
        self._at = -1


def audio_info(data: bytes, where: str) -> tuple[int, int]:
    """Samples per channel and sample rate in Hz, from the header."""
    with _sound(data, where) as sound:
        return sound.frames, sound.samplerate


def load_audio(data: bytes, start: int, stop: int, where: str) -> tuple[np.ndarray, int]:
    """Samples [start, stop) as float32 mono [n] in [-1, 1] (channels are averaged), and the rate in Hz."""
    with _sound(data, where) as sound:
        rate = sound.samplerate
        try:
            sound.seek(start)
            wave = sound.read(stop - start, dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.LibsndfileError as error:
            raise _unreadable("sound", where, error, "restore the recording or leave it out") from error
    if len(wave) < stop - start:
        raise DataError(
            f"{where}: samples {start} to {stop} are asked for, the sound ends after {start + len(wave)}; it is "
            "truncated or not the sound that was indexed: restore it or prepare the source again"
        )
    if not np.isfinite(wave).all():
        sample = start + int(np.flatnonzero(~np.isfinite(wave))[0])
        raise DataError(f"{where}: sample {sample} is not finite; repair the recording or leave it out")
    return wave, rate


def load_array(data: bytes, where: str) -> np.ndarray:
    """A table of readings, float or integer [rows, dimensions], from ``.npy`` bytes. Refuses NaN and infinity."""
    try:
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable("table", where, error, "write it with numpy.save, without objects") from error
    if table.ndim != 2 or table.dtype.kind not in "fiu":
        raise DataError(
            f"{where} holds {table.dtype} of shape {list(table.shape)}; a table of readings is numeric with two axes, "
            "rows and dimensions"
        )
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        row, column = wrong[0]
        raise DataError(
            f"{where}: row {row}, column {column} is {table[row, column]} ({len(wrong)} such values); "
            "drop or repair these readings before preparing"
        )
    return table


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode == "F":
        raise DataError(f"{where} holds floating-point pixels, whose range is unknown; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel (some decoders widen them to 32)
        grey = np.asarray(image).astype(np.int64)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 0xFFFF:
            raise DataError(f"{where} holds pixels of more than 16 bits, whose range is unknown; convert it to 16 bits")
        return np.repeat(((grey * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _sound(data: bytes, where: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _unreadable("sound", where, error, "give a WAV, FLAC, OGG or MP3 file, or leave it out") from error


def _file(data: bytes | Path) -> io.BytesIO | str:
    return io.BytesIO(data) if isinstance(data, bytes) else str(data)


def _checked_times(times_ns: np.ndarray, backend: Backend, where: str) -> np.ndarray:
    if not len(times_ns):
        raise DataError(f"{where} holds no video frame; record it again or leave it out")
    wrong = np.flatnonzero(times_ns[1:] <= times_ns[:-1])
    if len(wrong):
        at = int(wrong[0]) + 1
        raise DataError(
            f"{where}: {backend} reports times that do not increase (frame {at} at {times_ns[at]} ns after "
            f"{times_ns[at - 1]} ns); {_try_pyav(backend)}"
        )
    return times_ns


def _try_pyav(backend: Backend) -> str:
    if backend == "decord":
        return "set data.video_backend to pyav, or encode the video again as H.264 mp4"
    return "encode the video again as H.264 mp4, or leave it out"


def _unreadable(what: str, where: str, error: Exception, remedy: str) -> DataError:
    # decord's messages may quote the whole file; the sentence keeps the readable end of the first line.
    reason = re.sub(r"Error opening <.*?>: ", "", re.sub(r"[^\x20-\x7e]+", " ", str(error)))
    reason = reason.strip().removeprefix("Error: ")
    reason = reason if len(reason) <= 160 else f"...{reason[-160:]}"
    return DataError(f"{where} cannot be read as a {what} ({reason or type(error).__name__}); {remedy}")
