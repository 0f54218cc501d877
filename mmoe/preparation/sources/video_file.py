"""Reads videos, as containers of streams: which stream is meant, its times, and its audio by time.

Times are int64 ns after the start of the chosen video stream, the origin of `VideoFrames.times_ns`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from mmoe.data.load.containers import open_container, translated
from mmoe.preparation.clocks import SECOND_NS
from mmoe.preparation.sources.base import Refused
from mmoe.preparation.sources.encode import encode_flac, range_around
from mmoe.schema.bounds import check_bound
from mmoe.schema.channels import find_silence, to_mono
from mmoe.schema.sample import ALIGNMENT_NS

StreamChoice = int | Literal["best"] | None

_PREROLL_NS = 500_000_000  # decoders of audio need some packets before they are exact
_LASTING_NS = 200_000_000  # a deviation that is not repaid within this time is a gap: no block of a codec is as long
_SCALE = {"u8": 2**7, "s16": 2**15, "s32": 2**31, "flt": 1, "dbl": 1}  # full scale by sample format


@dataclass(frozen=True)
class VideoFile:
    """Holds what a file's header says: the chosen streams by number, and the length in ns.

    `audio` is None where there is none. `best` is true if the video is the stream that FFmpeg ranks first, which is the
    only one decord reads.
    """

    file: Path
    video: int
    best: bool
    audio: int | None
    length_ns: int


@dataclass(frozen=True)
class AudioRun:
    """Holds a piece of audio without a gap: mono f32 `wave` [n] whose first sample is at `start_ns`.

    `file_ns` [n] are the times of the samples by its packets. `silence` is the flag of audio that is silent.
    """

    start_ns: int
    rate: int
    wave: np.ndarray
    file_ns: np.ndarray
    silence: str | None = None

    @property
    def times_ns(self) -> np.ndarray:
        """The time [n] of every sample in ns, counted from the first at the rate."""
        return self.start_ns + np.arange(len(self.wave), dtype=np.int64) * SECOND_NS // self.rate

    def flac(self) -> bytes:
        """Encode the samples as FLAC, clipped to full scale."""
        return encode_flac(self.wave.clip(-1, 1), self.rate)


def open_video_file(file: Path, video: StreamChoice, audio: StreamChoice | Literal["none"]) -> VideoFile:
    """Choose the streams of a file; raise `Refused` where it cannot be read or the choice is not plain."""
    with open_container(file, str(file)) as container, translated(str(file)):
        seen = _choose(container, "video", video, file)
        heard = None if audio == "none" else _choose(container, "audio", audio, file)
        if seen is None:
            raise Refused("no video stream", f"{file} has no video stream; give a video file or leave it out")
        best = container.streams.best("video")
        media = VideoFile(
            file=file,
            video=seen.index,
            best=best is not None and best.index == seen.index,
            audio=None if heard is None else heard.index,
            length_ns=_stated_length(container, seen),
        )
    if media.length_ns <= 0:  # a camera that was switched off, a live recording: only the frames tell
        times_ns = packet_times(media)[media.video]
        media = replace(media, length_ns=int(times_ns[-1]) + 1 if len(times_ns) else 0)
        check_bound("video_seconds", media.length_ns / SECOND_NS, str(file), "has frames so many seconds apart")
    return media


def _choose(
    container: av.container.InputContainer, kind: Literal["video", "audio"], choice: StreamChoice, file: Path
) -> av.stream.Stream | None:
    """The stream of this kind; with no choice the first, where that is also FFmpeg's best."""
    streams = [s for s in container.streams if s.type == kind and s.codec_context is not None]
    found = [s for s in streams if not s.disposition & Disposition.attached_pic]
    said = ", ".join(f"{s.index} ({_about(s)})" for s in found)
    if isinstance(choice, int):
        chosen = next((stream for stream in found if stream.index == choice), None)
        if chosen is None:
            message = f"{file} has no {kind} stream {choice}, only {said or 'none'}; correct {_OPTIONS[kind]}"
            raise Refused("no such stream", message)
        return chosen
    best = container.streams.best(kind)
    if not found or best not in streams:
        return None  # an image of the cover alone is no video
    if choice is None and best.index != found[0].index:
        message = (
            f"{file} has {kind} streams {said}; some programs read the first and some the best (here {best.index}): "
            f"set {_OPTIONS[kind]} to a number or to best"
        )
        raise Refused(f"ambiguous {kind} stream", message)
    return best


_OPTIONS = {"video": "video_stream", "audio": "audio_stream"}


def _about(stream: av.stream.Stream) -> str:
    if isinstance(stream, VideoStream):
        return f"{stream.codec_context.name} {stream.codec_context.width}x{stream.codec_context.height}"
    assert isinstance(stream, AudioStream)
    return f"{stream.codec_context.name} {stream.codec_context.sample_rate} Hz"


def _stated_length(container: av.container.InputContainer, stream: av.stream.Stream) -> int:
    if stream.duration and stream.time_base:
        return _ns(stream.duration, stream.time_base)
    return container.duration * 1000 if container.duration else 0  # AV_TIME_BASE is microseconds


def _ns(ticks: int, base: Fraction) -> int:
    return round(ticks * SECOND_NS * base.numerator / base.denominator)


def _origin(stream: av.stream.Stream) -> int:
    return _ns(stream.start_time, stream.time_base) if stream.start_time and stream.time_base else 0


@lru_cache(maxsize=4)
def packet_times(media: VideoFile) -> dict[int, np.ndarray]:
    """Return the times [N] that the container gives the packets of the chosen streams, by stream number, sorted."""
    where = str(media.file)
    with open_container(media.file, where) as container, translated(where):
        streams = [container.streams[number] for number in (media.video, media.audio) if number is not None]
        origin_ns = _origin(streams[0])
        times: dict[int, list[int]] = {stream.index: [] for stream in streams}
        for packet in container.demux(streams):
            if packet.pts is not None and not packet.is_discard:
                times[packet.stream.index].append(_ns(packet.pts, packet.stream.time_base) - origin_ns)
        for of in times.values():
            check_bound("video_frames", len(of), where, "lists packets")
        return {number: np.sort(np.array(of, dtype=np.int64)) for number, of in times.items()}


def audio_between(media: VideoFile, start_ns: int, stop_ns: int) -> list[AudioRun]:
    """Read the audio in [start_ns, stop_ns): one run without a gap after the other, none where there is no audio.

    A run goes on a little to either side, for its pieces to be resampled as in the whole (`range_around`).
    """
    pieces, runs = list(_pieces(media, start_ns - _PREROLL_NS, stop_ns + _LASTING_NS)), []
    while pieces:
        count = _run_length(pieces)
        runs += _run(pieces[:count], start_ns, stop_ns)
        pieces = pieces[count:]
    return runs


class _Piece(NamedTuple):
    """A decoded frame of audio: the time of its first sample by the container, mono f32 [n], the rate in Hz.

    `number` is that of its first sample in the stream; `power` that of its loudest channel, summed over the samples.
    """

    time_ns: int
    number: int
    wave: np.ndarray
    rate: int
    power: float


def _run_length(pieces: list[_Piece]) -> int:
    """How many of the pieces follow on each other without a gap.

    Their times are held against the samples counted from the first piece on: containers round times, and what codecs
    of blocks of several sizes state for one block is repaid by the next. So only a deviation that lasts is a gap.
    """
    first, length = pieces[0], 1
    samples = len(first.wave)
    for number, piece in enumerate(pieces[1:], start=1):
        if piece.rate != first.rate:
            break
        if _deviates(piece.time_ns, first, samples):
            if piece.time_ns - pieces[length].time_ns > _LASTING_NS:
                break
        else:
            length = number + 1
        samples += len(piece.wave)
    return length


def _deviates(time_ns: int, first: _Piece, samples: int) -> bool:
    return abs(time_ns - first.time_ns - samples * SECOND_NS // first.rate) > ALIGNMENT_NS


def _run(pieces: list[_Piece], start_ns: int, stop_ns: int) -> list[AudioRun]:
    """The part of a run in [start_ns, stop_ns), if there is one."""
    first, rate, samples, file_ns = pieces[0], pieces[0].rate, 0, []
    for piece in pieces:
        counted_ns = first.time_ns + samples * SECOND_NS // rate
        begin_ns = counted_ns if _deviates(piece.time_ns, first, samples) else piece.time_ns
        file_ns.append(begin_ns + np.arange(len(piece.wave), dtype=np.int64) * SECOND_NS // rate)
        samples += len(piece.wave)
    whole = AudioRun(first.time_ns, rate, np.concatenate([piece.wave for piece in pieces]), np.concatenate(file_ns))
    inside = (whole.times_ns >= start_ns) & (whole.times_ns < stop_ns)
    if not inside.any():
        return []
    begins = np.cumsum([0, *(len(piece.wave) for piece in pieces)])
    within = [piece for piece, begin, end in zip(pieces, begins, begins[1:]) if inside[begin:end].any()]
    count = sum(len(piece.wave) for piece in within)
    heard = sum(float(np.square(piece.wave, dtype=np.float64).sum()) for piece in within)
    silence = find_silence(math.sqrt(heard / count), math.sqrt(sum(piece.power for piece in within) / count))
    places = np.flatnonzero(inside) + first.number
    kept = np.array(range_around(int(places[0]), int(places[-1]) + 1, first.number + samples, rate)) - first.number
    part = slice(max(0, int(kept[0])), int(kept[1]))
    return [AudioRun(int(whole.times_ns[part][0]), rate, whole.wave[part], whole.file_ns[part], silence)]


def _pieces(media: VideoFile, start_ns: int, stop_ns: int) -> Iterator[_Piece]:
    """The frames that begin in [start_ns, stop_ns), and some before it."""
    for seeks in (True, False):
        early_enough = not seeks
        for piece in _decoded(media, start_ns if seeks else None):
            early_enough = early_enough or piece.time_ns <= start_ns + _PREROLL_NS // 2
            if not early_enough or piece.time_ns >= stop_ns:
                break
            yield piece
        if early_enough:
            return  # else the seek led behind what was sought, and what is before can be had from the start


def _decoded(media: VideoFile, from_ns: int | None) -> Iterator[_Piece]:
    """The frames from the one that a seek to `from_ns` leads to on; None: from the start."""
    where = f"{media.file}, audio stream {media.audio},"
    with open_container(media.file, where) as container, translated(where, "set audio_stream to none"):
        stream = container.streams[media.audio]
        origin_ns, base, end_ns = _origin(container.streams[media.video]), stream.time_base, None
        begin_ns = _origin(stream) - origin_ns
        # Before the first packet there is nothing to seek to, and not every container says so by staying where it is.
        if from_ns is not None and from_ns + origin_ns > _origin(stream):
            container.seek((from_ns + origin_ns) * base.denominator // (base.numerator * SECOND_NS), stream=stream)
        for frame in container.decode(stream):
            time_ns = end_ns if frame.pts is None else _ns(frame.pts, frame.time_base) - origin_ns
            if time_ns is None:
                continue  # after a seek, before the first frame with a time
            samples = _samples(frame, media.file)
            power = float(np.square(samples).sum(axis=0).max())
            rate, number = frame.sample_rate, round((time_ns - begin_ns) * frame.sample_rate / SECOND_NS)
            yield _Piece(time_ns, number, to_mono(samples, where).astype(np.float32), rate, power)
            end_ns = time_ns + frame.samples * SECOND_NS // frame.sample_rate


def _samples(frame: av.AudioFrame, file: Path) -> np.ndarray:
    """The samples of a frame f64 [n, channels] in [-1, 1]."""
    kind = frame.format.name.removesuffix("p")
    if kind not in _SCALE:
        raise Refused(
            "unreadable audio", f"{file} holds audio in the format {frame.format.name}; convert it to 16 bits"
        )
    samples = frame.to_ndarray().astype(np.float64)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    samples = samples - 128 if kind == "u8" else samples
    return samples.T / _SCALE[kind]
