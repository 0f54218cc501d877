"""Simulates the embedded data set: a drive, written down as real recordings are.

`make_recording` is a pure function of (config, number): a seeded world (`world.py`), an expert who drives through it
(`driver.py`), six cameras (`render.py`) and the other sensors (`sensors.py`), each with a clock of its own. What a time
slice contains is then chosen from those clocks by `mmoe.preparation.clocks`, exactly as for a real rig. A recording has
these members, with N readings each:

=================== ==========================================================================================
``<camera>.mp4``    H.264, the camera's own frame times (the first frame is at file time 0)
``engine.flac``     engine audio, 8 kHz mono
``imu.npy``         [N, 6] f32 at 100 Hz, `VECTOR_NAMES["INERTIAL"]`
``state.npy``       [N, 1] f32 at 50 Hz, speed in m/s
``actions.npy``     [N, 3] f32 at 10 Hz: steering in [-1, 1] (left positive), throttle and brake in [0, 1], as
                    the driver commands them (the actuators lag behind)
``clip.json``       every stream's clock in ns of clip time, the captions, and what the world was
``clocks.npz``      every stream's clock as all time-sliced samples have it (`mmoe.preparation.slices.Clocks`)
=================== ==========================================================================================
"""

import json
from typing import Any, Final

import numpy as np
from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.data.load.frames import VideoFrames
from mmoe.preparation.clocks import SkewPolicy, last_at_or_before
from mmoe.preparation.simulation import sensors
from mmoe.preparation.simulation.captions import captions
from mmoe.preparation.simulation.driver import FASTEST, drive
from mmoe.preparation.simulation.render import Scene
from mmoe.preparation.simulation.world import World
from mmoe.preparation.slices import CLOCKS, Clocks, SensorStream, Slices, Texts, build_slices
from mmoe.preparation.sources.encode import encode_table
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera, Sample

KIND = "simulated_drive"
CLOCK: Final = "captured"
REFERENCE = Camera.FRONT
VECTOR_NAMES = {
    "ACTION": ("steering", "throttle", "brake"),
    "STATE": ("speed",),
    "INERTIAL": sensors.INERTIAL_NAMES,
}

MS = 1_000_000
ACTION_PERIOD_NS, STATE_PERIOD_NS, INERTIAL_PERIOD_NS = 100 * MS, 20 * MS, 10 * MS
AUDIO_RATE, AUDIO_PIECE = 8000, 1600  # of a slice: the last 200 ms
INERTIAL_ROWS = 10  # of a slice: the last 100 ms
ACTION_STEPS = 8  # the log reaches this far past the last slice

# The rig is triggered as it sweeps round and ends at the front, so that every other frame precedes the reference.
SWEEP_NS = {
    Camera.FRONT_RIGHT: 0,
    Camera.BACK_RIGHT: 8 * MS,
    Camera.BACK: 16 * MS,
    Camera.BACK_LEFT: 24 * MS,
    Camera.FRONT_LEFT: 32 * MS,
    Camera.FRONT: 40 * MS,
}
CAMERA_OFFSET_NS, CAMERA_JITTER_NS = 2 * MS, 800_000
SKEW_BUDGET_NS = 50 * MS
LEAD_IN_NS = 300 * MS  # audio and logs begin before the first image
FIRST_SLICE_NS = 50 * MS


class SimulatedDriveConfig(Config):
    """Describes a set of simulated recordings; each is a pure function of `seed` and its number."""

    recordings: int = Field(1000, ge=1)  # that are made
    seed: int = Field(0, ge=0)  # of all that is drawn
    slices: tuple[int, int] = (2, 8)  # fewest and most time slices of a recording
    slice_period_ns: int = 500 * MS  # from one time slice to the next
    height: int = 32  # of an image, pixels
    width: int = 64  # of an image, pixels
    camera_fps: int = Field(4, ge=1, le=20)  # images a second

    @model_validator(mode="after")
    def _check(self) -> "SimulatedDriveConfig":
        low, high = self.slices
        if not 1 <= low <= high:
            raise ValueError(f"slices {self.slices} is not (fewest, most); give two numbers with 1 <= fewest <= most")
        if self.height % 2 or self.width % 2 or min(self.height, self.width) < 16:
            raise ValueError(
                f"images of {self.height}x{self.width} cannot be H.264 yuv420p; choose even sides of at least 16"
            )
        if self.slice_period_ns < self.camera_period_ns:
            raise ValueError(
                f"slice_period_ns {self.slice_period_ns} is shorter than a camera's period {self.camera_period_ns}: "
                "slices would share frames; raise it or camera_fps"
            )
        return self

    @property
    def camera_period_ns(self) -> int:
        """The time between two images of a camera, in ns."""
        return 1_000 * MS // self.camera_fps


def make_recording(config: SimulatedDriveConfig, number: int) -> Sample:
    """Make recording `number` of the set: its members and the segments of its time slices."""
    key = recording_key(number)
    rng = np.random.default_rng((config.seed, number))
    slices = int(rng.integers(config.slices[0], config.slices[1] + 1))
    # Slices fall on this grid; the reference of each is the last frame of the reference camera.
    grid_ns = FIRST_SLICE_NS + config.slice_period_ns * np.arange(slices, dtype=np.int64)
    stop_ns = int(grid_ns[-1]) + 1
    log_stop_ns = stop_ns + (ACTION_STEPS + 1) * ACTION_PERIOD_NS

    world = World.generate(rng, FASTEST * log_stop_ns / 1e9)
    trajectory = drive(world, rng, -LEAD_IN_NS / 1e9, log_stop_ns / 1e9)
    clocks = _clocks(config, rng, stop_ns, log_stop_ns)
    frames_ns = clocks[video_name(REFERENCE)]
    reference_ns = frames_ns[last_at_or_before(frames_ns, grid_ns)]
    texts = captions(world, trajectory, reference_ns)

    scene = Scene(world, trajectory, config.height, config.width)
    members = {}
    for camera in Camera:
        times_ns = clocks[video_name(camera)]
        members[video_name(camera)] = sensors.video(scene.photograph(camera, times_ns), times_ns)
    members["engine.flac"] = sensors.engine_audio(rng, trajectory, clocks["engine.flac"], AUDIO_RATE)
    members["imu.npy"] = encode_table(sensors.inertial(rng, trajectory, clocks["imu.npy"]))
    members["state.npy"] = encode_table(sensors.wheel_speed(rng, trajectory, clocks["state.npy"]))
    commands = trajectory.at(clocks["actions.npy"], *VECTOR_NAMES["ACTION"])
    members["actions.npy"] = encode_table(np.stack(commands, axis=1))
    clip = {
        "reference": video_name(REFERENCE),
        "clocks_ns": {member: times.tolist() for member, times in clocks.items() if member != "engine.flac"},
        "audio": {"start_ns": int(clocks["engine.flac"][0]), "rate": AUDIO_RATE},
        "captions": texts,
        "world": {"sky": world.sky, "ground": world.ground, "waves": world.road.waves},
    }
    members["clip.json"] = json.dumps(clip).encode()
    members[CLOCKS] = Clocks(key, CLOCK, video_name(REFERENCE), clocks).to_bytes()
    built = _slices(config, members, clocks, reference_ns, texts, key)
    return Sample(key, key, members, built.segments, built.flags)


def recording_key(number: int) -> str:
    """Return the key of recording `number` and of its sample; it has no dot, as WebDataset demands."""
    return f"drive-{number:06d}"


def video_name(camera: Camera) -> str:
    """Return the name of the member that holds a camera's images."""
    return f"{camera.name.lower()}.mp4"


def _clocks(
    config: SimulatedDriveConfig, rng: np.random.Generator, stop_ns: int, log_stop_ns: int
) -> dict[str, np.ndarray]:
    """Each stream's own times (int64 ns of clip time) by member."""
    clocks = {}
    for camera in Camera:
        ticks_ns = SWEEP_NS[camera] + np.arange(0, stop_ns - SWEEP_NS[REFERENCE], config.camera_period_ns)
        clocks[video_name(camera)] = sensors.clock(rng, ticks_ns, CAMERA_OFFSET_NS, CAMERA_JITTER_NS)
    sample_ns = 1000 * MS // AUDIO_RATE
    clocks["engine.flac"] = sensors.clock(rng, np.arange(-LEAD_IN_NS, stop_ns, sample_ns), MS, 0)
    for member, stop, period, jitter in (
        ("imu.npy", stop_ns, INERTIAL_PERIOD_NS, INERTIAL_PERIOD_NS // 5),
        ("state.npy", stop_ns, STATE_PERIOD_NS, STATE_PERIOD_NS // 5),
        ("actions.npy", log_stop_ns, ACTION_PERIOD_NS, 0),
    ):
        clocks[member] = sensors.clock(rng, np.arange(-LEAD_IN_NS, stop, period), period // 2, jitter)
    return clocks


def _slices(
    config: SimulatedDriveConfig,
    members: dict[str, bytes],
    clocks: dict[str, np.ndarray],
    reference_ns: np.ndarray,
    texts: list[str],
    key: str,
) -> Slices:
    """The members of every slice: what each stream held at the reference, and the action from there on."""

    def stream(modality: Modality, member: str, max_gap_ns: int, **fields: Any) -> SensorStream:
        return SensorStream(member, modality, clocks[member], member, max_gap_ns, **fields)

    streams = []
    for camera in Camera:
        name, size = video_name(camera), (config.height, config.width)
        # A container knows the time of a frame after its first one.
        file_ns = clocks[name][0] + VideoFrames(members[name], "pyav", f"{key}.{name}").times_ns
        gap_ns = config.camera_period_ns
        streams.append(stream(Modality.VISION, name, gap_ns, camera=camera, size=size, file_ns=file_ns))
    streams += [
        stream(Modality.AUDIO, "engine.flac", SKEW_BUDGET_NS, window=AUDIO_PIECE, rate=AUDIO_RATE),
        stream(Modality.INERTIAL, "imu.npy", 2 * INERTIAL_PERIOD_NS, window=INERTIAL_ROWS),
        stream(Modality.STATE, "state.npy", 2 * STATE_PERIOD_NS),
        stream(Modality.ACTION, "actions.npy", ACTION_PERIOD_NS, choice="first"),
    ]
    skew = SkewPolicy(budget_ns=SKEW_BUDGET_NS, policy="strict")
    return build_slices(reference_ns, streams, skew, key, Texts("clip.json", texts))
