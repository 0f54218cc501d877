"""Reads videos with their audio: ``.mp4 .mov .mkv .avi .webm`` files, each a recording, cut into clips of time slices.

A slice is the last frame of a period (the reference) and the audio that led up to it, as long as a period.
Frames and audio are found by the times in the file, never by number / rate: the spacing of frames may vary, and audio
that begins late, has gaps or ends early is absent from its slices, not silent. Periods without a frame have no
slice; what is left behind the last whole period is not used. With several video or audio streams, some programs
read the first and some the one that FFmpeg ranks best; where these differ, `video_stream` or `audio_stream` must say
which. Silent audio is kept or left out (`silent_audio`), and counted.

Members of a clip: ``frame-<slice>.jpg``; ``audio-<run>.flac``, mono, one for each stretch without a gap; ``txt``;
``clip.json``, the file, the streams that were chosen, and where the clip starts; ``clocks.npz``. So a clip holds no
more of a video than its slices show, and any image of it is one read.

The folder may hold ``captions.jsonl``: rows ``{"video": path, "caption": text}``, optional `start_s` and `stop_s`
(absent or null: from its beginning, to its end); times that hold nowhere in the video are refused. The captions that
hold within a clip are its text, which follows the last slice and is a pair with the clip's images. Other files of
the folder are refused, so that they are counted.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.frames import DAMAGED, VideoFrames
from mmoe.data.load.video import VIDEO_SUFFIXES, VideoBackend
from mmoe.errors import DataError
from mmoe.preparation.clocks import ABSENT, SECOND_NS, SkewPolicy, last_at_or_before, nearest
from mmoe.preparation.slices import CLOCKS, Clocks, SensorStream, build_slices
from mmoe.preparation.sources import files, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.encode import encode_jpeg
from mmoe.preparation.sources.video_file import AudioRun, VideoFile, audio_between, open_video_file, packet_times
from mmoe.schema.channels import CANCELLED, CANCELLED_OUT, SILENT_OUT
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment

MS = 1_000_000
SKEW_BUDGET_NS = 10 * MS  # of the end of an audio clip from its frame
_MANIFEST = "captions.jsonl"
_NOWHERE = "caption holds nowhere"
_Captions = tuple[tuple[float, float, str], ...]  # start and stop in seconds, text


class _Line(NamedTuple):
    """A caption, from `start` to `stop` in seconds, and the line that has it."""

    start: float
    stop: float
    text: str
    where: str


class VideoConfig(Config):
    """Says which streams of a video are read, and how it is cut into clips."""

    slices: int = Field(8, ge=1)  # time slices of a clip
    slice_period_ns: int = Field(500 * MS, ge=20 * MS)  # from one time slice to the next
    video_stream: int | Literal["best"] | None = None  # number in the file; null: the one every program takes
    audio_stream: int | Literal["best", "none"] | None = None  # number in the file; null: the one every program takes
    silent_audio: Literal["keep", "leave_out"] = "keep"  # of audio that is silent as it is heard
    video_backend: VideoBackend = "auto"  # decord: what it is proven to read, the rest is refused
    image_quality: int = Field(95, ge=1, le=100)  # JPEG, 4:4:4


def items(path: Path, config: VideoConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of the video at `path`, or of every video under it.

    The number of clips follows from the length in the file's header.
    """
    root = path.parent if path.is_file() else path
    found = [path] if path.is_file() else files.listing(path, quarantine)
    video_files = [file for file in found if file == path or file.suffix.lower() in VIDEO_SUFFIXES]
    if not video_files:
        raise DataError(f"{path} holds no video ({', '.join(VIDEO_SUFFIXES)}); give a video file or a folder of them")
    others = (
        file for file in found if file.suffix.lower() not in VIDEO_SUFFIXES and file not in (path, root / _MANIFEST)
    )
    files.pass_over(others, root, f"{', '.join(VIDEO_SUFFIXES)} and {_MANIFEST}", quarantine)
    captions = _captions(root, {file.relative_to(root).as_posix() for file in video_files}, path.is_file(), quarantine)
    clip_ns = config.slices * config.slice_period_ns
    for file in video_files:
        recording = file.relative_to(root).as_posix()
        stem = recording.replace(".", "_")  # with the suffix: a.mp4 and a.mov are two recordings
        try:
            files.check_name(recording, str(root))
            media = open_video_file(file, config.video_stream, config.audio_stream)
        except Refused as refusal:
            quarantine(stem, refusal)
            continue
        lines = _within(captions.get(recording, []), media, quarantine)
        periods = max(1, media.length_ns // config.slice_period_ns)
        for start_ns in range(0, periods * config.slice_period_ns, clip_ns):
            key = f"{stem}-{start_ns // MS:08d}"
            last = start_ns + clip_ns >= periods * config.slice_period_ns
            make = partial(_clip, key, recording, media, start_ns, last, lines, config)
            yield Item(key, recording, make, start=start_ns, stop=start_ns + clip_ns)


def _captions(root: Path, names: set[str], alone: bool, quarantine: Refuse) -> dict[str, list[_Line]]:
    """The captions of each video; rows that name no video are refused (of a file given alone: passed over)."""
    found: dict[str, list[_Line]] = defaultdict(list)
    if not (root / _MANIFEST).is_file():
        return {}
    for where, row in jsonl.rows(root / _MANIFEST, quarantine):
        try:
            name, text = jsonl.name_of(row, "video", where), jsonl.text_of(row, "caption", where)
            jsonl.encode_text(text, where)
            start, stop = _seconds(row, "start_s", 0.0, where), _seconds(row, "stop_s", math.inf, where)
            if start >= stop:
                raise Refused(_NOWHERE, f"{where}: it starts at {start} s and stops at {stop} s; correct the times")
            if name not in names and not alone:
                raise Refused("missing file", f"{where}: there is no video {name}; restore it or remove the line")
        except Refused as refusal:
            quarantine(where, refusal)
            continue
        found[name].append(_Line(start, stop, text, where))
    return found


def _within(lines: list[_Line], media: VideoFile, quarantine: Refuse) -> _Captions:
    """The captions of a video that begin before its end, in order; the others are refused."""
    kept = []
    for line in sorted(lines):
        if line.start * SECOND_NS >= media.length_ns:
            seconds = media.length_ns / SECOND_NS
            message = (
                f"{line.where}: it starts at {line.start} s, {media.file} lasts {seconds:.3f} s; give the times in "
                "seconds of the video"
            )
            quarantine(line.where, Refused(_NOWHERE, message))
        else:
            kept.append((line.start, line.stop, line.text))
    return tuple(kept)


def _seconds(row: dict[str, Any], field: str, default: float, where: str) -> float:
    """The time in `field`; where it is absent or null, the video's beginning or end."""
    value = default if row.get(field) is None else jsonl.number_of(row, field, where, "a number of seconds")
    if value < 0:
        raise Refused(_NOWHERE, f"{where}: {field!r} is {value!r}, before the video; correct the times")
    return float(value)


def _clip(
    key: str, recording: str, media: VideoFile, start_ns: int, last: bool, captions: _Captions, config: VideoConfig
) -> Sample:
    video = _video(media, config.video_backend)
    stop_ns = start_ns + config.slices * config.slice_period_ns
    origin_ns = int(video.times_ns[0]) + start_ns  # of the clip, in the time of the file
    frames = _references(video.times_ns, origin_ns, last, config)
    if not len(frames):
        message = (
            f"{media.file} has no frame from {start_ns / 1e9:.3f} s to {stop_ns / 1e9:.3f} s, though its header says "
            f"that it lasts {media.length_ns / 1e9:.3f} s; repair the file (remux it) or leave it out"
        )
        raise Refused("clip without a frame", message)
    file_ns = video.times_ns[frames]
    members: dict[str, bytes] = {}
    names = [f"frame-{number}.jpg" for number in range(len(frames))]
    for name, image in zip(names, video.frames(frames)):
        members[name] = encode_jpeg(image, config.image_quality)
    reference_ns = file_ns - origin_ns
    packets = packet_times(media)
    container_ns = packets[media.video]
    stated_ns = container_ns[nearest(container_ns, file_ns)] - origin_ns
    streams = [SensorStream("video", Modality.VISION, reference_ns, names, 0, size=video.size, file_ns=stated_ns)]

    cancelled: set[str] = set()
    flags: Counter[str] = Counter({DAMAGED: sum(frame in video.damaged for frame in frames.tolist())})
    runs = _audio(media, int(file_ns[0]) - config.slice_period_ns + 1, int(file_ns[-1]), config, flags)
    for number, run in enumerate(runs):
        member = f"audio-{number}.flac"
        members[member] = run.flac()
        cancelled |= {member} if run.silence == CANCELLED else set()
        streams.append(
            SensorStream(
                member,
                Modality.AUDIO,
                run.times_ns - origin_ns,
                member,
                SKEW_BUDGET_NS,
                window=config.slice_period_ns * run.rate // SECOND_NS,
                rate=run.rate,
                file_ns=run.file_ns - origin_ns,
            )
        )
    slices = build_slices(reference_ns, streams, SkewPolicy(budget_ns=SKEW_BUDGET_NS), str(media.file))
    segments = _whole_pieces(slices.segments, config.slice_period_ns)
    if last:
        flags["video: periods after the length in the header, left out"] = max(
            0, (int(video.times_ns[-1]) - int(video.times_ns[0]) - stop_ns) // config.slice_period_ns
        )
    if media.audio is not None:
        flags["audio: absent"] = len(frames) - sum(s.modality is Modality.AUDIO for s in segments)
    text = " ".join(t for start, stop, t in captions if start * 1e9 < stop_ns and stop * 1e9 > start_ns)
    if text:
        members["txt"] = jsonl.encode_text(text, str(media.file))
        segments = [replace(s, pair=0) if s.modality is Modality.VISION else s for s in segments]
        end = segments[-1]
        place = {"slice": end.slice, "timestamp_ns": end.timestamp_ns, "pair": 0}
        segments.append(Segment(Modality.TEXT, "txt", text=text, **place))
    about = {
        "file": recording,
        "video_stream": media.video,
        "audio_stream": media.audio,
        "video_backend": config.video_backend,
        "start_ns": start_ns,
    }
    members["clip.json"] = json.dumps(about).encode()
    times = {"video": video.times_ns - origin_ns}
    if media.audio is not None:
        times["audio"] = packets[media.audio] - origin_ns  # of its packets, some dozens a second
    members[CLOCKS] = Clocks(recording, "captured", "video", times, origin_ns).to_bytes()
    return Sample(key, recording, members, segments, +flags, frozenset(cancelled))


def _references(times_ns: np.ndarray, origin_ns: int, last: bool, config: VideoConfig) -> np.ndarray:
    """The last frame in each period of the clip [n]; the last frame of all where the video is shorter than one."""
    ends_ns = origin_ns + config.slice_period_ns * np.arange(1, config.slices + 1, dtype=np.int64)
    # Frames lie at the start of what they show: a period has passed when a frame of the next one could follow.
    spacing_ns = int(np.median(np.diff(times_ns))) if len(times_ns) > 1 else config.slice_period_ns
    over_ns = max(int(times_ns[-1]) + spacing_ns, int(times_ns[0]) + config.slice_period_ns)
    ends_ns = ends_ns[ends_ns <= over_ns + MS] if last else ends_ns
    frames = np.unique(last_at_or_before(times_ns, ends_ns - 1))
    return frames[(frames != ABSENT) & (times_ns[frames] >= origin_ns)]


def _audio(media: VideoFile, start_ns: int, last_ns: int, config: VideoConfig, flags: Counter[str]) -> list[AudioRun]:
    """The runs of audio from `start_ns` up to the last frame; counts what is left out."""
    if media.audio is None:
        return []
    runs = audio_between(media, start_ns, last_ns + 1)
    if runs and config.silent_audio == "leave_out" and all(run.silence for run in runs):
        flags[CANCELLED_OUT if any(run.silence == CANCELLED for run in runs) else SILENT_OUT] = 1
        return []
    return runs


def _whole_pieces(segments: list[Segment], period_ns: int) -> list[Segment]:
    """The segments without the audio clips that fill less than half of their slice's period, and one audio a slice."""
    kept, heard = [], set()
    for segment in segments:
        if segment.modality is Modality.AUDIO:
            length_ns = (segment.stop - segment.start) * SECOND_NS // segment.rate
            if 2 * length_ns < period_ns or segment.slice in heard:
                continue
            heard.add(segment.slice)
        kept.append(segment)
    return kept


@lru_cache(maxsize=2)
def _video(media: VideoFile, backend: VideoBackend) -> VideoFrames:
    where = f"{media.file} (video stream {media.video})"
    return VideoFrames(media.file, backend, where, None if media.best else media.video, key="video_backend")


SOURCE = Source(kind="video", clock="captured", skew_budget_ns=SKEW_BUDGET_NS, config=VideoConfig, items=items)
