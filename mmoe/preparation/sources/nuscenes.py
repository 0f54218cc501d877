"""Reads raw nuScenes: six cameras that fire as the lidar sweeps past, key frames twice a second, scenes of 20 s.

`path` holds ``samples/<CAM>/<log>__<CAM>__<timestamp>.jpg`` and, in ``v1.0-*/`` or beside them, the tables
``sample.json``, ``sample_data.json``, ``calibrated_sensor.json``, ``sensor.json``, ``ego_pose.json``, ``scene.json``
and ``log.json``; the bus in ``can_bus/<scene>_<message>.json`` where it was unpacked. All times are unix microseconds,
read as integers; an image's name must agree with its row to 1 ms. A scene is one recording.

A slice stands at each key frame of the `reference` camera. With `causal`, that is by default the last one of the
sweep, so that the other five were taken up to about 43 ms before it, and each is the last at or before it; without,
each is the nearest one. Members of a clip:

========= ======================== ============================================================================
VISION    ``<camera>-<row>.jpg``   the key frames; absent, and counted, where none is within `camera_gap_ns`
INERTIAL  ``imu.npy`` [N, 6]       ``ms_imu``: acceleration in m/s2 and rotation rate in rad/s, each x, y, z
STATE     ``state.npy`` [N, 2]     speed in m/s and yaw rate in rad/s, from the ego poses of the last 0.1 s or more
ACTION    ``actions.npy`` [N, 2]   every 50 ms the steering wheel's angle in rad (``steeranglefeedback``) and the
                                   speed in m/s (``pose``) reached one step later: the last readings within the step
========= ======================== ============================================================================
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.media import image_size
from mmoe.errors import counted_as
from mmoe.preparation.clocks import ABSENT, SkewPolicy, check_clock, completed_from, last_at_or_before
from mmoe.preparation.slices import BAD_CLOCK, CLOCKS, Clocks, SensorStream, build_slices, next_step
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.encode import encode_table
from mmoe.preparation.sources.files import read_regular
from mmoe.preparation.sources.nuscenes_tables import Bus, SceneTables, read_scenes
from mmoe.preparation.splits import GAP_NS
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera, Sample

MS = 1_000_000
PERIOD_NS = 50 * MS  # of actions
SKEW_BUDGET_NS = 50 * MS
_SKEW = SkewPolicy(budget_ns=SKEW_BUDGET_NS, policy="flag")
INERTIAL_ROWS = 10  # of a slice: the last 100 ms
# With the half second that a slice may look back, within the gap that a split leaves in a recording.
_FURTHEST = (GAP_NS - 500 * MS) // PERIOD_NS
POSES_APART_NS = 100 * MS  # over which speed and yaw rate are taken

_STAMP = re.compile(r"__(\d{16})\.\w+$")
CAMERAS = {
    "CAM_FRONT": Camera.FRONT,
    "CAM_FRONT_LEFT": Camera.FRONT_LEFT,
    "CAM_FRONT_RIGHT": Camera.FRONT_RIGHT,
    "CAM_BACK": Camera.BACK,
    "CAM_BACK_LEFT": Camera.BACK_LEFT,
    "CAM_BACK_RIGHT": Camera.BACK_RIGHT,
}
Channel = Literal["CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
_MISSING_FILE = "image file is missing"


class NuscenesConfig(Config):
    """Says how nuScenes scenes are cut into clips."""

    slices: int = Field(4, ge=1)  # time slices of a clip
    causal: bool = True  # the last reading before a slice; false: the nearest
    reference: Channel = "CAM_BACK_LEFT"  # ends the sweep; without `causal`, CAM_FRONT is as good
    skew: Annotated[SkewPolicy, completed_from(_SKEW)] = _SKEW
    camera_gap_ns: int = Field(150 * MS, ge=0)  # from the reference, beyond which a key frame is that of another slice
    max_gap_ns: int = Field(
        200 * MS, ge=0, le=400 * MS
    )  # age of a reading of pose, bus or inertial unit beyond which it is absent
    lookahead: int = Field(20, ge=1, le=_FURTHEST)  # actions after a clip in its table


@dataclass(frozen=True)
class _Clip:
    key: str
    scene: SceneTables
    references: tuple[int, int]  # the key frames of the reference camera, half-open


def items(path: Path, config: NuscenesConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of the scenes under `path`; raise DataError where the tables are missing or malformed."""
    for scene in read_scenes(path):
        frames = scene.frames.get(config.reference)
        if frames is None:
            message = f"scene {scene.name} has no key frame of {config.reference}; choose another reference camera"
            quarantine(scene.name, Refused("no reference frame", message))
            continue
        lost = scene.samples - frames.samples
        for sample in sorted(lost):
            message = f"sample {sample} of scene {scene.name} has no key frame of {config.reference}: it is no slice"
            quarantine(f"{scene.name}-{sample}", Refused("no reference frame", message))
        for at in range(0, len(frames.times_ns), config.slices):
            stop = min(at + config.slices, len(frames.times_ns))
            clip = _Clip(f"{scene.name}-{at:03d}", scene, (at, stop))
            start_ns, stop_ns = int(frames.times_ns[at]), int(frames.times_ns[stop - 1])
            yield Item(clip.key, scene.name, partial(_sample, clip, config, path), start=start_ns, stop=stop_ns + 1)


def _sample(clip: _Clip, config: NuscenesConfig, root: Path) -> Sample:
    scene = clip.scene
    flags: Counter[str] = Counter()
    whole_ns = scene.frames[config.reference].times_ns
    origin_ns = int(whole_ns[clip.references[0]])
    reference_ns = whole_ns[slice(*clip.references)] - origin_ns
    bus = {name: Bus.read(root, scene.name, name) for name in ("ms_imu", "pose", "steeranglefeedback")}

    members: dict[str, bytes] = {}
    streams = [_camera(channel, clip, config, root, reference_ns, origin_ns, members, flags) for channel in CAMERAS]
    imu = np.concatenate([bus["ms_imu"].column("linear_accel", 3), bus["ms_imu"].column("rotation_rate", 3)], axis=1)
    imu_ns = bus["ms_imu"].times_ns - origin_ns
    streams.append(_table("imu", Modality.INERTIAL, imu_ns, imu, INERTIAL_ROWS, reference_ns, config, members))
    motion_ns, motion = _motion(scene)
    streams.append(_table("state", Modality.STATE, motion_ns - origin_ns, motion, 1, reference_ns, config, members))
    streams.append(_actions(bus, reference_ns, origin_ns, config, members))
    slices = build_slices(reference_ns, streams, config.skew, f"scene {scene.name}")
    if not slices.segments:
        message = f"scene {scene.name}: nothing of clip {clip.key} is within its maximum gap; leave it out"
        raise Refused("nothing observed", message)
    used = {segment.member for segment in slices.segments}
    members = {name: data for name, data in members.items() if name in used}
    clocks = {channel: frames.times_ns for channel, frames in scene.frames.items()}
    clocks |= {"ego_pose": scene.poses_ns} | {name: log.times_ns for name, log in bus.items()}
    clocks = {name: times - origin_ns for name, times in clocks.items() if len(times)}
    members[CLOCKS] = Clocks(scene.name, "captured", config.reference, clocks, origin_ns).to_bytes()
    return Sample(clip.key, scene.name, members, slices.segments, flags + slices.flags)


def _camera(
    channel: str,
    clip: _Clip,
    config: NuscenesConfig,
    root: Path,
    reference_ns: np.ndarray,
    origin_ns: int,
    members: dict[str, bytes],
    flags: Counter[str],
) -> SensorStream:
    """The key frames of a camera that the slices of a clip can choose from, with their images in `members`."""
    stream = SensorStream(
        channel,
        Modality.VISION,
        np.zeros(0, np.int64),
        [],
        config.camera_gap_ns,
        choice="last" if config.causal else "nearest",
        camera=CAMERAS[channel],
    )
    frames = clip.scene.frames.get(channel)
    if frames is None:
        return stream
    times_ns = frames.times_ns - origin_ns
    near = (times_ns >= reference_ns[0] - config.camera_gap_ns) & (times_ns <= reference_ns[-1] + config.camera_gap_ns)
    rows, names, sizes, file_ns = [], [], [], []
    for row in np.flatnonzero(near).tolist():
        file = root / frames.files[row]
        try:
            image = read_regular(file)
        except OSError:
            flags[f"{channel}: {_MISSING_FILE}"] += 1
            continue
        stamp = _STAMP.search(file.name)
        if stamp is None:
            message = f"{file}: the name does not end in __<16 digits>.<suffix>; restore its name in the data set"
            raise Refused(BAD_CLOCK, message)
        rows.append(row)
        names.append(f"{CAMERAS[channel].name.lower()}-{row:03d}{file.suffix.lower()}")
        sizes.append(image_size(image, str(file)))
        file_ns.append(int(stamp[1]) * 1000 - origin_ns)
        members[names[-1]] = image
    return replace(stream, times_ns=times_ns[rows], member=names, size=sizes, file_ns=np.array(file_ns, np.int64))


def _table(
    name: str,
    modality: Modality,
    times_ns: np.ndarray,
    table: np.ndarray,
    window: int,
    reference_ns: np.ndarray,
    config: NuscenesConfig,
    members: dict[str, bytes],
) -> SensorStream:
    """The readings of a log that the slices of a clip can choose from, as the member ``<name>.npy``."""
    _check_clock(times_ns, name)
    first, stop = np.searchsorted(times_ns, (reference_ns[0] - config.max_gap_ns, reference_ns[-1] + 1))
    rows = slice(max(int(first) - window, 0), int(stop))
    members[f"{name}.npy"] = encode_table(table[rows])
    return SensorStream(name, modality, times_ns[rows], f"{name}.npy", config.max_gap_ns, window=window)


def _motion(scene: SceneTables) -> tuple[np.ndarray, np.ndarray]:
    """Times [N] and (speed, yaw rate) [N, 2] at each ego pose, from it and the last one at least 0.1 s before."""
    times_ns, poses = scene.poses_ns, scene.poses
    before = last_at_or_before(times_ns, times_ns - POSES_APART_NS, POSES_APART_NS * 5)
    rows = np.flatnonzero(before != ABSENT)
    before = before[rows]
    seconds = (times_ns[rows] - times_ns[before]) / 1e9
    speed = np.linalg.norm(poses[rows, :3] - poses[before, :3], axis=1) / seconds
    turn = poses[rows, 3] - poses[before, 3]
    yaw_rate = ((turn + np.pi) % (2 * np.pi) - np.pi) / seconds
    return times_ns[rows], np.stack([speed, yaw_rate], axis=1)


def _actions(
    bus: dict[str, Bus],
    reference_ns: np.ndarray,
    origin_ns: int,
    config: NuscenesConfig,
    members: dict[str, bytes],
) -> SensorStream:
    """What the driver had reached one step after each time of a 50 ms grid; ends where a reading is missing."""
    last = int(reference_ns[-1] - reference_ns[0]) // PERIOD_NS + 1 + config.lookahead
    times_ns = reference_ns[0] + PERIOD_NS * np.arange(-1, last + 1, dtype=np.int64)
    columns = {"steeranglefeedback": bus["steeranglefeedback"].column("value", 1), "pose": _speed(bus)}
    reached = [(_check_clock(bus[name].times_ns - origin_ns, name), column) for name, column in columns.items()]
    run, table = next_step(times_ns, PERIOD_NS, reached)
    members["actions.npy"] = encode_table(table)
    return SensorStream("actions", Modality.ACTION, times_ns[run], "actions.npy", PERIOD_NS, choice="first")


def _speed(bus: dict[str, Bus]) -> np.ndarray:
    return bus["pose"].column("vel", 3)[:, :1]  # forward


def _check_clock(times_ns: np.ndarray, name: str) -> np.ndarray:
    with counted_as(BAD_CLOCK):
        return check_clock(times_ns, name, f"can_bus or ego_pose ({name})")


SOURCE = Source(
    kind="nuscenes",
    clock="captured",
    skew_budget_ns=SKEW_BUDGET_NS,
    config=NuscenesConfig,
    items=items,
    vector_names={
        "INERTIAL": (
            "acceleration_x",
            "acceleration_y",
            "acceleration_z",
            "rotation_x",
            "rotation_y",
            "rotation_z",
        ),
        "STATE": ("speed", "yaw_rate"),
        "ACTION": ("steering_angle", "speed"),
    },
    action_period_ns=PERIOD_NS,
)
