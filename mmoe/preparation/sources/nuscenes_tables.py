"""Reads the tables of nuScenes as arrays by scene, and its bus messages; all times are int64 ns of unix time."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.data.load.reading import reading
from mmoe.errors import DataError, brief, counted_as
from mmoe.preparation.sources import jsonl
from mmoe.preparation.sources.base import Refused

_LATEST_US = 2**63 // 1000  # in int64 nanoseconds


@dataclass(frozen=True)
class Frames:
    """Holds the key frames of one camera in a scene, in order of time."""

    times_ns: np.ndarray  # [N]
    files: tuple[str, ...]  # relative to the root
    samples: frozenset[str]  # tokens of the samples they belong to


@dataclass(frozen=True)
class SceneTables:
    """Holds a scene: its samples' tokens, the key frames by camera channel, and its N ego poses.

    `poses` [N, 4] are x, y, z in m and the yaw in rad in the map's frame at `poses_ns` [N], strictly increasing.
    """

    name: str
    samples: frozenset[str]
    frames: dict[str, Frames]
    poses_ns: np.ndarray
    poses: np.ndarray


def read_scenes(root: Path) -> Iterator[SceneTables]:
    """Yield the scenes of every set of tables under `root`, in order of name; raise DataError for a malformed table."""
    folders = [root] if (root / "scene.json").is_file() else sorted(file.parent for file in root.glob("*/scene.json"))
    if not folders:
        raise DataError(
            f"{root} holds neither scene.json nor a folder with one, so it is no nuScenes set; give the folder that "
            "holds samples and v1.0-*"
        )
    for folder in folders:
        with reading("set of nuScenes tables", str(folder), "restore its tables"):
            yield from _scenes(folder)


def _scenes(folder: Path) -> Iterator[SceneTables]:
    logs = {row["token"] for row in _table(folder, "log", "token")}
    scenes = {row["token"]: row["name"] for row in _table(folder, "scene", "token", "name", "log_token")}
    for row in _table(folder, "scene", "log_token"):
        if row["log_token"] not in logs:
            raise _dangling(folder, "scene", "log", row["log_token"])
    scene_of = {row["token"]: row["scene_token"] for row in _table(folder, "sample", "token", "scene_token")}
    sensors = {row["token"]: row for row in _table(folder, "sensor", "token", "channel", "modality")}
    channel_of = {}
    for row in _table(folder, "calibrated_sensor", "token", "sensor_token"):
        if row["sensor_token"] not in sensors:
            raise _dangling(folder, "calibrated_sensor", "sensor", row["sensor_token"])
        sensor = sensors[row["sensor_token"]]
        channel_of[row["token"]] = sensor["channel"] if sensor["modality"] == "camera" else None
    poses = {row["token"]: row for row in _table(folder, "ego_pose", "token", "timestamp", "translation", "rotation")}

    frames: dict[str, dict[str, list[tuple[int, str, str]]]] = defaultdict(lambda: defaultdict(list))
    ego: dict[str, dict[int, list[float]]] = defaultdict(dict)
    needed = (
        "sample_token",
        "calibrated_sensor_token",
        "ego_pose_token",
        "timestamp",
        "filename",
        "is_key_frame",
    )
    for row in _table(folder, "sample_data", *needed):
        for key, table, known in (
            ("sample_token", "sample", scene_of),
            ("calibrated_sensor_token", "calibrated_sensor", channel_of),
            ("ego_pose_token", "ego_pose", poses),
        ):
            if row[key] not in known:
                raise _dangling(folder, "sample_data", table, row[key])
        scene = scene_of[row["sample_token"]]
        pose = poses[row["ego_pose_token"]]
        ego[scene][_ns(pose["timestamp"], folder / "ego_pose.json")] = [*pose["translation"], _yaw(pose["rotation"])]
        channel = channel_of[row["calibrated_sensor_token"]]
        if channel is not None and row["is_key_frame"]:
            time_ns = _ns(row["timestamp"], folder / "sample_data.json")
            frames[scene][channel].append((time_ns, row["filename"], row["sample_token"]))

    samples: dict[str, set[str]] = defaultdict(set)
    for token, scene in scene_of.items():
        samples[scene].add(token)
    for token, name in sorted(scenes.items(), key=lambda pair: pair[1]):
        times = sorted(ego[token])
        yield SceneTables(
            name=name,
            samples=frozenset(samples[token]),
            frames={channel: _frames(rows) for channel, rows in sorted(frames[token].items())},
            poses_ns=np.array(times, np.int64),
            poses=np.array([ego[token][time] for time in times], np.float64).reshape(len(times), 4),
        )


def _frames(rows: list[tuple[int, str, str]]) -> Frames:
    rows = sorted(rows)
    times_ns = np.array([time for time, _, _ in rows], np.int64)
    return Frames(times_ns, tuple(file for _, file, _ in rows), frozenset(sample for _, _, sample in rows))


def _yaw(rotation: list[float]) -> float:
    w, x, y, z = rotation
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def _ns(microseconds: Any, file: Path) -> int:
    if type(microseconds) is not int or abs(microseconds) > _LATEST_US:
        said = brief(microseconds)
        raise DataError(f"{file}: the time {said} is not an integer of microseconds; restore the table")
    return microseconds * 1000


def _table(folder: Path, name: str, *keys: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.json"
    rows = jsonl.load_json(file, "unpack the metadata of nuScenes there")
    strings = {key for key in keys if key.endswith("token") or key in ("name", "channel", "modality", "filename")}
    for number, row in enumerate(rows if isinstance(rows, list) else [None]):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else keys
        if missing:
            raise DataError(f"{file}: row {number} has no {', '.join(missing)}; restore the table")
        if wrong := [key for key in strings if not isinstance(row[key], str)]:
            raise DataError(f"{file}: row {number} has no string in {', '.join(sorted(wrong))}; restore the table")
    return rows


def _dangling(folder: Path, table: str, other: str, token: str) -> DataError:
    return DataError(f"{folder / table}.json names {other} {token!r}, which {other}.json lacks; restore both tables")


@dataclass(frozen=True)
class Bus:
    """Holds the messages of one kind in a scene; no rows where the scene has none."""

    file: Path
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, root: Path, scene: str, message: str) -> "Bus":
        """Read the messages of one kind in a scene; raise `Refused` for a file that is not a list of messages."""
        file = root / "can_bus" / f"{scene}_{message}.json"
        if not file.is_file():
            return cls(file, [])
        with counted_as("unreadable log"):
            rows = jsonl.load_json(file, "restore it")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "utime" in row for row in rows):
            raise Refused("unreadable log", f"{file} is not a list of messages with utime; restore it")
        return cls(file, rows)

    @property
    def times_ns(self) -> np.ndarray:
        """The times [N] of the N messages in ns, as the file has them."""
        return np.array([_ns(row["utime"], self.file) for row in self.rows], np.int64)

    def column(self, key: str, width: int) -> np.ndarray:
        """Return the values [N, width] of the N messages under a key."""
        try:
            table = np.array([row[key] for row in self.rows], np.float64)
            return table.reshape(len(self.rows), width)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            message = f"{self.file}: {key!r} is not {width} numbers in every message ({error}); restore the file"
            raise Refused("unreadable log", message) from error
