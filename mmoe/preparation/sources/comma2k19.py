"""Reads comma2k19: one minute segments of a highway commute, with the log of the car's bus and an inertial unit.

A segment is a folder with ``global_pose/frame_times`` (``.npy`` content without the extension, as all its logs),
``processed_log/CAN/{speed,steering_angle}/{t,value}``, ``processed_log/IMU/{accelerometer,gyro}/{t,value}`` and the
images, ``video.hevc``. Times are float64 seconds since the device booted, one clock for all. A folder of digits is
a segment of the drive that its parent names (``<dongle>|<date>``); the recording is the drive, since segments of one
drive follow each other.

The reference is the front camera; a slice is every `slice_period_ns`. A clip is cut where frames are missing. Every
slice holds, as of its reference or before (with `causal: false` interpolated):

========= ======================= =============================================================================
VISION    ``front-<slice>.jpg``   the frame; absent, and counted, where the segment has no video
INERTIAL  ``imu.npy`` [N, 6]      accelerometer in m/s2 and gyro in rad/s, each forward, right, down
STATE     ``state.npy`` [N, 2]    speed in m/s, at its own clock, and the steering angle in degrees that held then
ACTION    ``actions.npy`` [N, 2]  per frame (20 Hz) the steering angle in degrees and the speed in m/s that the
                                  driver had reached one step (50 ms) later: the last reading within the step
========= ======================= =============================================================================

``clocks.npz`` holds the raw clocks of the segment, radar included, of which no segment is made.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.containers import open_container, translated
from mmoe.data.load.frames import DAMAGED
from mmoe.data.load.tables import load_npy
from mmoe.errors import DataError, counted_as
from mmoe.preparation.clocks import (
    SkewPolicy,
    check_clock,
    completed_from,
    exact_repeats,
    last_at_or_before,
    seconds_to_ns,
)
from mmoe.preparation.slices import (
    BAD_CLOCK,
    CLOCKS,
    REPEATED,
    Clocks,
    SensorStream,
    build_slices,
    held,
    interpolated,
    next_step,
)
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.encode import encode_table
from mmoe.preparation.sources.files import read_regular
from mmoe.preparation.splits import GAP_NS
from mmoe.schema.bounds import check_bound
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera, Sample

MS = 1_000_000
PERIOD_NS = 50 * MS  # of frames and of actions
INERTIAL_ROWS = 10  # of a slice: the last 96 ms

# With the half second that a slice may look back, within the gap that a split leaves in a recording.
_FURTHEST = (GAP_NS - 500 * MS) // PERIOD_NS
_FRAMES = "global_pose/frame_times"
_LOGS = {
    "speed": ("CAN/speed", 1),
    "steering_angle": ("CAN/steering_angle", 1),
    "accelerometer": ("IMU/accelerometer", 3),
    "gyro": ("IMU/gyro", 3),
}
_CLOCKS_ONLY = {"radar": "CAN/radar"}
_SKEW = SkewPolicy(budget_ns=MS, policy="strict")
_VIDEOS = ("video.hevc", "video.mp4", "video.mkv")


class Comma2k19Config(Config):
    """Says how comma2k19 segments are cut into clips."""

    slices: int = Field(8, ge=1)  # time slices of a clip
    slice_period_ns: int = Field(500 * MS, ge=PERIOD_NS)  # from one time slice to the next
    lookahead: int = Field(20, ge=1, le=_FURTHEST)  # actions after a clip in its table
    max_gap_ns: int = Field(
        100 * MS, ge=0, le=400 * MS
    )  # age of a speed, steering or inertial reading beyond which it is absent
    skew: Annotated[SkewPolicy, completed_from(_SKEW)] = _SKEW
    causal: bool = True  # readings as of their slice or before; false: interpolated
    repeats: Literal["refuse", "drop"] = "refuse"  # drop: only readings that equal the one before, time and value
    image_quality: int = Field(92, ge=1, le=100)  # JPEG, of the frames taken from the video


@dataclass(frozen=True)
class _Clip:
    """Which frames of a segment are the references of a clip, and which rows are its actions (half-open)."""

    key: str
    recording: str
    segment: Path
    references: tuple[int, ...]
    images: tuple[int, ...]  # the references of all clips of the segment: its video is decoded once
    actions: tuple[int, int]


def items(path: Path, config: Comma2k19Config, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of the segment at `path`, or of every segment under it; raise DataError where there is none."""
    found = [path] if (path / _FRAMES).is_file() else sorted(file.parents[1] for file in path.rglob(_FRAMES))
    if not found:
        raise DataError(f"{path} holds no {_FRAMES}, so it is no comma2k19 segment; give the folder of the segments")
    for segment in found:
        recording, name = _names(segment)
        try:
            frames_ns = _frames(segment)
        except DataError as error:
            quarantine(name, error if isinstance(error, Refused) else Refused(BAD_CLOCK, str(error)))
            continue
        clips = list(_clips(segment, recording, name, frames_ns, config))
        images = tuple(row for clip in clips for row in clip.references)
        for clip in clips:
            clip = replace(clip, images=images)
            start, stop = int(frames_ns[clip.references[0]]), int(frames_ns[clip.references[-1]])
            make = partial(_sample, clip, config)
            yield Item(clip.key, recording, make, start=start, stop=stop + config.slice_period_ns)


def _names(segment: Path) -> tuple[str, str]:
    """Recording and name of a segment; the characters of keys are letters, digits, - and _."""
    segment = segment.resolve()
    name = segment.name
    drive, name = (segment.parent.name, f"{segment.parent.name}-{name}") if name.isdigit() else (name, name)
    legal = [re.sub(r"[^A-Za-z0-9_-]", "_", text) for text in (drive, name)]
    return legal[0], legal[1]


def _frames(segment: Path) -> np.ndarray:
    """The frames' times [N] int64 ns since boot."""
    file = segment / _FRAMES
    return check_clock(seconds_to_ns(_column(file, 1)[:, 0], "frames", str(file)), "frames", str(file))


def _clips(segment: Path, recording: str, name: str, frames_ns: np.ndarray, config: Comma2k19Config) -> Iterator[_Clip]:
    """Cut the frames where one is missing, then into clips of `slices` references."""
    cuts = np.flatnonzero(np.diff(frames_ns) > PERIOD_NS * 3 // 2) + 1
    for run in np.split(np.arange(len(frames_ns)), cuts):
        if not len(run):
            continue
        times_ns = frames_ns[run]
        # Half a frame later: a frame that is early or late by jitter still belongs to its place on the grid.
        grid_ns = np.arange(times_ns[0], times_ns[-1] + 1, config.slice_period_ns) + PERIOD_NS // 2
        references = run[np.unique(last_at_or_before(times_ns, grid_ns))].tolist()
        for at in range(0, len(references), config.slices):
            rows = tuple(references[at : at + config.slices])
            following = references[at + config.slices : at + config.slices + 1] or [int(run[-1]) + 1]
            actions = (max(rows[0] - 1, int(run[0])), min(following[0] + config.lookahead, int(run[-1]) + 1))
            yield _Clip(f"{name}-{rows[0]:06d}", recording, segment, rows, (), actions)


def _column(file: Path, width: int) -> np.ndarray:
    """A log [N, width] float64. Raises `Refused` where it is missing or has another shape."""
    try:
        with counted_as("unreadable log"):
            table = load_npy(read_regular(file), str(file))
    except OSError as error:
        raise Refused(
            "missing file", f"{file} cannot be read ({error.strerror}); restore it or remove the segment"
        ) from error
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] != width or table.dtype.kind != "f":
        message = f"{file} holds {table.dtype} {list(table.shape)}, not floats [N, {width}]; restore it"
        raise Refused("unreadable log", message)
    return table.astype(np.float64)


@dataclass(frozen=True)
class _Log:
    """A log in clip time: `times_ns` [N], `values` [N, D], `file_ns` [N] its seconds converted by another way."""

    times_ns: np.ndarray
    values: np.ndarray
    file_ns: np.ndarray


def _logs(clip: _Clip, config: Comma2k19Config, origin_s: float, flags: Counter[str]) -> dict[str, _Log]:
    """The logs of a segment, checked. Repeats are counted by the clip in whose time they lie."""
    origin_ns = int(seconds_to_ns(np.array([origin_s]), "frames", str(clip.segment))[0])
    logs = {}
    for name, (folder, width) in _LOGS.items():
        file = clip.segment / "processed_log" / folder / "t"
        seconds, values = _column(file, 1)[:, 0], _column(file.with_name("value"), width)
        if len(seconds) != len(values):
            message = f"{file} has {len(seconds)} times for {len(values)} values; restore the log"
            raise Refused("unreadable log", message)
        with counted_as(BAD_CLOCK):
            times_ns = seconds_to_ns(seconds, name, str(file)) - origin_ns
            if config.repeats == "drop":
                same = exact_repeats(times_ns, values)
                span_ns = config.slice_period_ns * len(clip.references)
                if count := int((same & (times_ns >= 0) & (times_ns < span_ns)).sum()):
                    flags[f"{name}: {REPEATED}"] += count
                times_ns, values, seconds = times_ns[~same], values[~same], seconds[~same]
            check_clock(times_ns, name, str(file))
        logs[name] = _Log(times_ns, values, ((seconds - origin_s) * 1e9).astype(np.int64))
    return logs


def _sample(clip: _Clip, config: Comma2k19Config) -> Sample:
    flags: Counter[str] = Counter()
    seconds = _column(clip.segment / _FRAMES, 1)[:, 0]
    origin_s = float(seconds[clip.references[0]])
    boot_ns = _frames(clip.segment)
    origin_ns = int(boot_ns[clip.references[0]])
    frames_ns = boot_ns - origin_ns
    reference_ns = frames_ns[list(clip.references)]
    logs = _logs(clip, config, origin_s, flags)

    members: dict[str, bytes] = {}
    streams = [_front(clip, config, reference_ns, seconds - origin_s, members, flags)]
    joined = (("imu", Modality.INERTIAL, "accelerometer", "gyro"), ("state", Modality.STATE, "speed", "steering_angle"))
    for name, modality, first, second in joined:
        window = INERTIAL_ROWS if modality is Modality.INERTIAL else 1
        streams.append(_readings(name, modality, logs[first], logs[second], window, reference_ns, config, members))
    streams.append(_actions(clip, logs, frames_ns, config, members))

    slices = build_slices(reference_ns, streams, config.skew, str(clip.segment))
    if not slices.segments:
        message = f"{clip.segment}: no slice of clip {clip.key} has a reading within its maximum gap; leave it out"
        raise Refused("nothing observed", message)
    members = {name: data for name, data in members.items() if any(s.member == name for s in slices.segments)}
    clocks = {"front": frames_ns} | {name: _raw_ns(clip.segment, folder) - origin_ns for name, folder in _ALL.items()}
    log = clip.key.rpartition("-")[0]
    clocks = {name: times for name, times in clocks.items() if len(times)}
    members[CLOCKS] = Clocks(log, "captured", "front", clocks, origin_ns).to_bytes()
    return Sample(clip.key, clip.recording, members, slices.segments, flags + slices.flags)


_ALL = {name: folder for name, (folder, _) in _LOGS.items()} | _CLOCKS_ONLY


def _raw_ns(segment: Path, folder: str) -> np.ndarray:
    """A log's times [N] ns since boot as they are, [0] where a log that makes no segment is not there."""
    file = segment / "processed_log" / folder / "t"
    if not file.is_file() and folder in _CLOCKS_ONLY.values():
        return np.zeros(0, np.int64)
    return seconds_to_ns(_column(file, 1)[:, 0], folder, str(file))


def _front(
    clip: _Clip,
    config: Comma2k19Config,
    reference_ns: np.ndarray,
    seconds: np.ndarray,
    members: dict[str, bytes],
    flags: Counter[str],
) -> SensorStream:
    rows = list(clip.references)
    video = next((clip.segment / name for name in _VIDEOS if (clip.segment / name).is_file()), None)
    names, sizes = [], []
    if video is None:
        reference_ns, rows = reference_ns[:0], rows[:0]
    else:
        images, size, damaged = _images(video, clip.images, len(seconds), config.image_quality)
        flags[DAMAGED] += len(damaged.intersection(rows))
        names = [f"front-{number}.jpg" for number in range(len(rows))]
        sizes = [size] * len(rows)
        members.update(zip(names, (images[row] for row in rows)))
    file_ns = (seconds[rows] * 1e9).astype(np.int64)
    gap_ns = config.skew.budget_ns
    return SensorStream(
        "front", Modality.VISION, reference_ns, names, gap_ns, camera=Camera.FRONT, size=sizes, file_ns=file_ns
    )


@lru_cache(maxsize=1)
def _images(
    video: Path, rows: tuple[int, ...], frames: int, quality: int
) -> tuple[dict[int, bytes], tuple[int, int], set[int]]:
    """The frames `rows` of a video as JPEG, their height and width, and which of them the decoder made up in part.

    The video must have `frames` frames.
    """
    wanted, images, size, count = set(rows), {}, (0, 0), 0
    damaged, in_damage = set(), False
    where, remedy = str(video), "restore it, or remove it to go without images"
    with open_container(video, where) as container, translated(where, remedy):
        # A raw stream has no times: its frames are those of `frame_times`, in order.
        for count, frame in enumerate(container.decode(video=0), start=1):
            check_bound("video_frames", count, where, "has frames")
            in_damage = frame.is_corrupt or (in_damage and not frame.key_frame)
            if count - 1 in wanted:
                buffer = io.BytesIO()
                frame.to_image().save(buffer, "JPEG", quality=quality)
                images[count - 1], size = buffer.getvalue(), (frame.height, frame.width)
                if in_damage:
                    damaged.add(count - 1)
    if count != frames:
        message = f"{video} has {count} frames, {_FRAMES} has {frames} times; restore the segment"
        raise Refused(BAD_CLOCK, message)
    return images, size, damaged


def _readings(
    name: str,
    modality: Modality,
    first: _Log,
    second: _Log,
    window: int,
    reference_ns: np.ndarray,
    config: Comma2k19Config,
    members: dict[str, bytes],
) -> SensorStream:
    """Two logs as one table at the clock of the first; what the second held then is no older than the maximum gap."""
    if config.causal:
        near = np.searchsorted(first.times_ns, (reference_ns[0] - config.max_gap_ns, reference_ns[-1] + 1))
        rows = slice(max(near[0] - window, 0), near[1])
        other, valid = held(first.times_ns[rows], second.times_ns, second.values, config.max_gap_ns)
        times_ns, table = first.times_ns[rows], np.concatenate([first.values[rows], other], axis=1)
        file_ns, gap_ns = first.file_ns[rows][valid], config.max_gap_ns
    else:
        parts = [interpolated(reference_ns, log.times_ns, log.values, config.max_gap_ns) for log in (first, second)]
        times_ns, valid = reference_ns, parts[0][1] & parts[1][1]
        table = np.concatenate([part for part, _ in parts], axis=1)
        file_ns, gap_ns, window = None, 0, 1
    members[f"{name}.npy"] = encode_table(table[valid])
    return SensorStream(name, modality, times_ns[valid], f"{name}.npy", gap_ns, window=window, file_ns=file_ns)


def _actions(
    clip: _Clip, logs: dict[str, _Log], frames_ns: np.ndarray, config: Comma2k19Config, members: dict[str, bytes]
) -> SensorStream:
    """What the driver had reached one step after each frame; ends where a reading is missing, so that rows stay 50 ms
    apart."""
    times_ns = frames_ns[slice(*clip.actions)]
    reached = [(logs[name].times_ns, logs[name].values) for name in SOURCE.vector_names["ACTION"]]
    run, table = next_step(times_ns, PERIOD_NS, reached)
    members["actions.npy"] = encode_table(table)
    return SensorStream("actions", Modality.ACTION, times_ns[run], "actions.npy", 0, choice="first")


SOURCE = Source(
    kind="comma2k19",
    clock="captured",
    skew_budget_ns=MS,
    config=Comma2k19Config,
    items=items,
    vector_names={
        "INERTIAL": (
            "acceleration_forward",
            "acceleration_right",
            "acceleration_down",
            "rotation_forward",
            "rotation_right",
            "rotation_down",
        ),
        "STATE": ("speed", "steering_angle"),
        "ACTION": ("steering_angle", "speed"),
    },
    action_period_ns=PERIOD_NS,
)
