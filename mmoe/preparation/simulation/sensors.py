"""Records a simulated drive: clocks with their own offset and jitter, and the files that each sensor writes.

N: readings or images; H, W: height and width of an image.
"""

from fractions import Fraction
from io import BytesIO
from math import pi

import av
import numpy as np
import soundfile

from mmoe.preparation.simulation.driver import Trajectory

VIDEO_TIME_BASE = Fraction(1, 1_000_000)  # the container keeps frame times to a microsecond
_H264 = {"preset": "superfast", "tune": "zerolatency", "crf": "18"}
_GOP = 8

INERTIAL_NAMES = ("accel_x", "accel_y", "accel_z", "gyro_x", "gyro_y", "gyro_z")  # m/s^2, rad/s; forward, left, up
GRAVITY = 9.81
# The unit is bolted to the body without damping: one reading is mostly engine and road.
ACCEL_VIBRATION, GYRO_VIBRATION = 3.0, 0.35
ACCEL_BIAS, GYRO_BIAS = 0.1, 0.01
GRADE = 0.06  # of the road, seen by the accelerometer as a share of gravity
SPEED_NOISE = 0.15  # m/s

IDLE_HZ, HZ_PER_SPEED = 30.0, 11.0  # the engine's pitch


def clock(rng: np.random.Generator, ticks_ns: np.ndarray, offset_ns: int, jitter_ns: int) -> np.ndarray:
    """Return what a sensor's own clock says at `ticks_ns` [N] i64: shifted as a whole, and jittered about each tick."""
    shift = int(rng.integers(-offset_ns, offset_ns + 1))
    return ticks_ns + shift + rng.integers(-jitter_ns, jitter_ns + 1, len(ticks_ns))


def video(images: np.ndarray, times_ns: np.ndarray) -> bytes:
    """Encode images [N, H, W, 3] u8 as an mp4 (H.264, yuv420p, no B-frames) whose first frame is at file time 0."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", options=_H264)
        context = stream.codec_context
        context.height, context.width, context.pix_fmt = *images.shape[1:3], "yuv420p"
        context.time_base = stream.time_base = VIDEO_TIME_BASE
        context.gop_size, context.thread_count = _GOP, 1
        for image, time in zip(images, (times_ns - times_ns[0] + 500) // 1000):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(time), VIDEO_TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def engine_audio(rng: np.random.Generator, trajectory: Trajectory, times_ns: np.ndarray, rate: int) -> bytes:
    """Make the FLAC of the engine's audio: harmonics of a pitch that follows speed, under wind that grows with it.

    `rate` is in Hz, `times_ns` in ns of clip time.
    """
    (speed,) = trajectory.at(times_ns, "speed")
    phase = 2 * pi * np.cumsum(IDLE_HZ + HZ_PER_SPEED * speed) / rate + rng.uniform(0, 2 * pi)
    wave = sum(np.sin(order * phase) / order for order in (1, 2, 3, 5))
    wind = rng.standard_normal(len(speed)) * (0.003 * speed)
    buffer = BytesIO()
    soundfile.write(buffer, (0.2 * wave + wind).clip(-1, 1).astype(np.float32), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def inertial(rng: np.random.Generator, trajectory: Trajectory, times_ns: np.ndarray) -> np.ndarray:
    """Return readings [N, 6] f32 of an accelerometer (specific force) and a gyroscope, named by INERTIAL_NAMES."""
    speed, acceleration, yaw_rate = trajectory.at(times_ns, "speed", "acceleration", "yaw_rate")
    readings = np.zeros((len(times_ns), 6))
    readings[:, 0] = acceleration + GRAVITY * rng.normal(0, GRADE)
    readings[:, 1] = speed * yaw_rate
    readings[:, 2] = GRAVITY
    readings[:, 5] = yaw_rate
    scale = np.repeat((ACCEL_VIBRATION, GYRO_VIBRATION), 3)
    readings += rng.normal(0, np.repeat((ACCEL_BIAS, GYRO_BIAS), 3))
    readings += rng.standard_normal(readings.shape) * scale
    return readings.astype(np.float32)


def wheel_speed(rng: np.random.Generator, trajectory: Trajectory, times_ns: np.ndarray) -> np.ndarray:
    """Return readings [N, 1] f32 of the speed in m/s."""
    (speed,) = trajectory.at(times_ns, "speed")
    return (speed + rng.normal(0, SPEED_NOISE, len(speed)))[:, None].astype(np.float32)
