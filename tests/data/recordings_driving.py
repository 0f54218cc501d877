"""Small driving recordings, laid out exactly as comma2k19 and nuScenes are."""

import json
from pathlib import Path

import numpy as np

from tests.data.recordings import images, npy, png, video

FRAME_S, CAN_S, IMU_S = 0.05, 0.012, 0.0096
BOOT_S = 46408.547498


def write_segment(folder: Path, seconds: float = 6.0, with_video: bool = False, boot_s: float = BOOT_S, **changes):
    """A comma2k19 segment whose speed at time t is 10 + t m/s and whose steering angle is -t degrees.

    `changes` maps the name of a log ("speed", "frames", ...) to a function of its times and values that returns both.
    """
    rng = np.random.default_rng(1)
    frames = boot_s + FRAME_S * np.arange(round(seconds / FRAME_S))
    # The bus starts later than the video and ends later, with jitter.
    can = boot_s + 0.04 + CAN_S * np.arange(round((seconds + 0.04) / CAN_S))
    speed, steering = (np.sort(can + rng.uniform(-0.004, 0.004, len(can))) for _ in range(2))
    imu = boot_s + 0.032 + IMU_S * np.arange(round((seconds + 0.04) / IMU_S))
    logs = {
        "frames": ("global_pose/frame_times", frames, None),
        "speed": ("processed_log/CAN/speed", speed, (10 + speed - boot_s)[:, None]),
        "steering_angle": ("processed_log/CAN/steering_angle", steering, -(steering - boot_s)),
        "accelerometer": ("processed_log/IMU/accelerometer", imu, np.stack([imu - boot_s] * 3, 1)),
        "gyro": ("processed_log/IMU/gyro", imu, np.stack([boot_s - imu] * 3, 1)),
    }
    for name, (path, times, values) in logs.items():
        if name in changes:
            times, values = changes[name](times, values)
        if values is None:
            files = {path: times}
            frames = times
        else:
            files = {f"{path}/t": times, f"{path}/value": values}
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(npy(content))
    if with_video:
        data = video(images(len(frames)), container="hevc", codec="libx265", **{"x265-params": "log-level=none"})
        (folder / "video.hevc").write_bytes(data)


# In the order in which the lidar meets them, with the offsets in us that were measured on a real key frame.
SWEEP_US = {
    "CAM_FRONT_LEFT": 0,
    "CAM_FRONT": 7_600,
    "CAM_FRONT_RIGHT": 15_500,
    "CAM_BACK_RIGHT": 23_000,
    "CAM_BACK": 32_700,
    "CAM_BACK_LEFT": 42_600,
}
START_US = 1_532_402_927_604_844
SPEED, YAW_RATE = 8.0, 0.2  # m/s, rad/s of the ego vehicle


def write_nuscenes(
    root: Path,
    scenes: int = 2,
    samples: int = 6,
    can_bus: bool = True,
    missing: tuple[tuple[str, int], ...] = (),
    edit=lambda tables: None,
) -> dict:
    """A nuScenes set: key frames every 0.5 s of a car that drives a circle. `missing` has no row for (camera, sample);
    `edit` may change the tables before they are written. Returns the tables."""
    names = ("sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose", "scene", "log")
    tables: dict[str, list[dict]] = {name: [] for name in names}
    for channel in (*SWEEP_US, "LIDAR_TOP"):
        kind = "lidar" if channel == "LIDAR_TOP" else "camera"
        tables["sensor"].append({"token": f"s-{channel}", "channel": channel, "modality": kind})
        row = {"token": f"c-{channel}", "sensor_token": f"s-{channel}", "camera_intrinsic": []}
        tables["calibrated_sensor"].append(row)
    rng = np.random.default_rng(0)
    for scene in range(scenes):
        name, start = f"scene-{scene:04d}", START_US + scene * 60_000_000
        tables["log"].append({"token": f"log{scene}", "logfile": "n015-2018", "vehicle": "n015", "location": "x"})
        row = {"token": f"scene{scene}", "name": name, "log_token": f"log{scene}", "description": "turn"}
        tables["scene"].append(row)
        for number in range(samples):
            token, at = f"sample{scene}-{number}", start + number * 500_000
            tables["sample"].append({"token": token, "timestamp": at, "scene_token": f"scene{scene}"})
            for step in range(10):  # the lidar's sweeps between key frames: ego poses at 20 Hz
                time = at + step * 50_000 + 1
                _pose(tables, token, "LIDAR_TOP", time, start, step == 0, f"sweeps/LIDAR_TOP/l__{time}.bin")
            for channel, offset in SWEEP_US.items():
                if (channel, number) in missing:
                    continue
                time = at + offset
                file = f"samples/{channel}/n015-2018__{channel}__{time}.jpg"
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes(png(rng.integers(0, 255, (18, 32, 3), dtype=np.uint8)))
                _pose(tables, token, channel, time, start, True, file)
        if can_bus:
            _write_bus(root / "can_bus", name, start, samples)
    edit(tables)
    (root / "v1.0-mini").mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return tables


def _pose(tables: dict, sample: str, channel: str, time_us: int, start_us: int, key: bool, file: str) -> None:
    token, angle = f"{channel}-{time_us}", YAW_RATE * (time_us - start_us) / 1e6
    radius = SPEED / YAW_RATE
    where = [radius * np.sin(angle), radius * (1 - np.cos(angle)), 0.0]
    rotation = [np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]
    tables["ego_pose"].append({"token": token, "timestamp": time_us, "translation": where, "rotation": rotation})
    tables["sample_data"].append(
        {
            "token": token,
            "sample_token": sample,
            "ego_pose_token": token,
            "calibrated_sensor_token": f"c-{channel}",
            "timestamp": time_us,
            "is_key_frame": key,
            "filename": file,
            "height": 18,
            "width": 32,
        }
    )


def _write_bus(folder: Path, scene: str, start_us: int, samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    span = samples * 500_000 + 200_000
    steering = [
        {"utime": start_us + t, "value": t / 1e6} for t in range(-100_000, span, 10_000)
    ]  # rad: seconds since the start
    pose = [{"utime": start_us + t, "vel": [20 + t / 1e6, 0.0, 0.0]} for t in range(-100_000, span, 20_000)]
    imu = [
        {"utime": start_us + t, "linear_accel": [t / 1e6, 0, 9.8], "rotation_rate": [0, 0, YAW_RATE]}
        for t in range(-100_000, span, 10_000)
    ]
    for name, rows in (("steeranglefeedback", steering), ("pose", pose), ("ms_imu", imu)):
        (folder / f"{scene}_{name}.json").write_text(json.dumps(rows))
