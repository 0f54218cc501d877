"""Reads videos, as containers of streams: which stream is meant, its times, and its audio by time.

Times are int64 ns after the start of the chosen video stream, the origin of `VideoFrames.times_ns`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from mmoe.data.load.containers import open_container, translated
from mmoe.preparation.clocks import SECOND_NS
from mmoe.preparation.sources.base import Refused
from mmoe.preparation.sources.encode import encode_flac
from mmoe.schema.bounds import check_bound
from mmoe.schema.sample import ALIGNMENT_NS

StreamChoice = int | Literal["best"] | None

_PREROLL_NS = 500_000_000  # decoders of audio need some packets before they are exact
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

    `file_ns` [n] are the times of the samples by its packets.
    """

    start_ns: int
    rate: int
    wave: np.ndarray
    file_ns: np.ndarray

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
    """Read the audio in [start_ns, stop_ns): one run without a gap after the other, none where there is no audio."""
    runs: list[AudioRun] = []
    parts: list[tuple[int, np.ndarray]] = []
    rate = 0
    for time_ns, wave, its_rate in _audio_frames(media, start_ns, stop_ns):
        end_ns = parts[0][0] + sum(len(w) for _, w in parts) * SECOND_NS // rate if parts else None
        if end_ns is None or its_rate != rate or abs(time_ns - end_ns) > ALIGNMENT_NS:
            runs += _run(parts, rate, start_ns, stop_ns)
            parts, rate = [], its_rate
        parts.append((time_ns, wave))
    return runs + _run(parts, rate, start_ns, stop_ns)


def _run(parts: list[tuple[int, np.ndarray]], rate: int, start_ns: int, stop_ns: int) -> list[AudioRun]:
    if not parts:
        return []
    wave = np.concatenate([wave for _, wave in parts])
    file_ns = np.concatenate([t + np.arange(len(w), dtype=np.int64) * SECOND_NS // rate for t, w in parts])
    whole = AudioRun(parts[0][0], rate, wave, file_ns)
    inside = (whole.times_ns >= start_ns) & (whole.times_ns < stop_ns)
    if not inside.any():
        return []
    first = int(inside.argmax())
    return [AudioRun(int(whole.times_ns[first]), rate, wave[inside], file_ns[inside])]


def _audio_frames(media: VideoFile, start_ns: int, stop_ns: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(time, mono f32 [n], rate) of decoded frames that reach into [start_ns, stop_ns), and of some before it."""
    where = f"{media.file}, audio stream {media.audio},"
    with open_container(media.file, where) as container, translated(where, "set audio_stream to none"):
        stream = container.streams[media.audio]
        origin_ns = _origin(container.streams[media.video])
        base = stream.time_base
        wanted_ns = start_ns + origin_ns - _PREROLL_NS
        container.seek(wanted_ns * base.denominator // (base.numerator * SECOND_NS), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            time_ns = _ns(frame.pts, frame.time_base) - origin_ns
            if time_ns >= stop_ns:
                return
            if time_ns + frame.samples * SECOND_NS // frame.sample_rate > start_ns:
                yield time_ns, _mono(frame, media.file), frame.sample_rate


def _mono(frame: av.AudioFrame, file: Path) -> np.ndarray:
    """The mean of a frame's channels, f32 [n] in [-1, 1]."""
    kind = frame.format.name.removesuffix("p")
    if kind not in _SCALE:
        raise Refused(
            "unreadable audio", f"{file} holds audio in the format {frame.format.name}; convert it to 16 bits"
        )
    samples = frame.to_ndarray().astype(np.float64)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    samples = samples - 128 if kind == "u8" else samples
    return (samples.mean(axis=0) / _SCALE[kind]).astype(np.float32)
