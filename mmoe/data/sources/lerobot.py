"""LeRobot datasets, version 3.0: robot episodes in parquet, with videos that hold many episodes end to end.

`input` is the dataset's folder (``meta/info.json``). The picture of a row is the frame of each video at the
episode's `from_timestamp` + the row's `timestamp`; it must be there to 1 ms. Pictures may also stand inside parquet
(features of dtype ``image``). State and action are the features that the options name; their dimensions have the
names of ``info.json``. The instruction of a row is its task. A row's time is its number / fps, made by the writer: the
clock is synthetic and says nothing of how far sensors were apart. What is cut from an episode, and how
the ends are padded, is said in `episodes.py`.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from mmoe.data import sync
from mmoe.data.frames import DAMAGED, Backend, VideoFrames
from mmoe.data.sample import Modality, Sample
from mmoe.data.sources.base import Item, Quarantine, Refused, Source, Vectors
from mmoe.data.sources.encode import encode_jpeg
from mmoe.data.sources.episodes import Episode, EpisodeConfig, View, camera_of, clip, windows
from mmoe.errors import DataError

VERSION = "v3.0"
_CONVERT = "convert it with `python -m lerobot.datasets.v30.convert_dataset_v21_to_v30`"
_EPISODE = ("episode_index", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")
_ROW = ("timestamp", "frame_index", "index", "task_index")

CameraName = Literal["front", "front_left", "front_right", "back", "back_left", "back_right"]


class LeRobotConfig(EpisodeConfig):
    # Which rig camera's embedding each picture feature takes, null for none; features left out are not read. May be
    # left empty where there is one at most.
    cameras: dict[str, CameraName | None] = {}
    state: str | None = "observation.state"  # null: none
    action: str | None = "action"
    video_backend: Backend = "auto"
    picture_quality: int = Field(95, ge=1, le=100)  # JPEG, of the frames taken from videos


@dataclass(frozen=True)
class _Dataset:
    """`info.json`, and the features that are read."""

    root: Path
    info: dict[str, Any]
    cameras: dict[str, CameraName | None]
    vectors: dict[Modality, str]

    @property
    def fps(self) -> float:
        return self.info["fps"]

    def path(self, template: str, **place: Any) -> Path:
        return self.root / self.info[template].format(**place)


def items(path: Path, config: LeRobotConfig, quarantine: Quarantine) -> Iterator[Item]:
    """Clips of every episode, in the order of ``meta/episodes``."""
    dataset = _open(path, config)
    tasks = _tasks(path)
    columns = [*_EPISODE, *(f"videos/{key}/{name}" for key in _videos(dataset) for name in _VIDEO)]
    for file in sorted((path / "meta/episodes").rglob("*.parquet")):
        for episode in _table(file, columns).to_pylist():
            name = f"episode-{episode['episode_index']:06d}"
            extent = episode["dataset_to_index"] - episode["dataset_from_index"]
            if extent != episode["length"] or extent < 1:
                message = (
                    f"{file}: episode {episode['episode_index']} has length {episode['length']} and rows "
                    f"{episode['dataset_from_index']} to {episode['dataset_to_index']}; repair the metadata"
                )
                quarantine(name, Refused("inconsistent episode", message))
                continue
            for rows in windows(extent, config):
                key = f"{name}-{rows[0]:06d}"
                yield Item(key, name, partial(_clip, dataset, tasks, key, name, episode, rows, config))


def describe(path: Path, config: LeRobotConfig) -> Vectors:
    """Names as ``info.json`` gives them; an action's period is 1 / fps."""
    dataset = _open(path, config)
    names = {modality.name: _names(dataset, key) for modality, key in dataset.vectors.items()}
    return Vectors(names, round(1e9 / dataset.fps) if config.action else 0)


_VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def _open(path: Path, config: LeRobotConfig) -> _Dataset:
    file = path / "meta/info.json"
    try:
        info = json.loads(file.read_bytes())
        version, features = info["codebase_version"], info["features"]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give the folder of a LeRobot dataset") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not the description of a LeRobot dataset ({error}); restore it") from error
    if version != VERSION:
        raise DataError(f"{path} is a LeRobot dataset {version}; only {VERSION} is read: {_CONVERT}")
    pictures = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
    cameras = config.cameras or {key: None for key in pictures}
    if len(pictures) > 1 and not config.cameras:
        raise DataError(
            f"{path} has the cameras {', '.join(pictures)}; say by the option cameras which rig camera stands for "
            'each, so that the model can tell them apart, as cameras={"' + pictures[0] + '": front, ...}'
        )
    vectors = {Modality.STATE: config.state, Modality.ACTION: config.action}
    wanted = [*cameras, *(key for key in vectors.values() if key is not None)]
    for key in wanted:
        if key not in features:
            raise DataError(
                f"{path} has no feature {key!r}; it has {', '.join(features)}: set the options cameras, state, action"
            )
    for key in cameras:
        if key not in pictures:
            raise DataError(f"{path}: feature {key!r} is {features[key]['dtype']}, not pictures; correct cameras")
    return _Dataset(path, info, cameras, {m: key for m, key in vectors.items() if key is not None})


def _names(dataset: _Dataset, key: str) -> tuple[str, ...]:
    """A feature's dimensions: a list, a mapping name -> list or name -> column, or none (numbered)."""
    feature = dataset.info["features"][key]
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 1:
        raise DataError(f"{dataset.root}: feature {key!r} has shape {shape}; only vectors can be state or action")
    if isinstance(names, dict):
        lists = [value for value in names.values() if isinstance(value, list)]
        names = lists[0] if len(lists) == 1 else list(names)
    if names is None:
        names = [f"{key.rpartition('.')[2]}_{number}" for number in range(shape[0])]
    if len(names) != shape[0]:
        raise DataError(f"{dataset.root}: feature {key!r} has shape {shape} but names {names}; correct info.json")
    return tuple(map(str, names))


def _videos(dataset: _Dataset) -> list[str]:
    return [key for key in dataset.cameras if dataset.info["features"][key]["dtype"] == "video"]


def _tasks(path: Path) -> dict[int, str]:
    """Task text by number; the text is the table's index, which pandas may have named in several ways."""
    table = _table(path / "meta/tasks.parquet", None)
    texts = next((name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)), None)
    texts = texts or next((n for n in table.column_names if pa.types.is_large_string(table.schema.field(n).type)), None)
    if texts is None or "task_index" not in table.column_names:
        raise DataError(f"{path / 'meta/tasks.parquet'} has columns {table.column_names}, no text and task_index")
    return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist()))


def _table(file: Path, columns: list[str] | None, **rows: Any) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns, partitioning=None, **rows)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"{file} cannot be read ({error}); restore it, or prepare without it") from error


def _clip(
    dataset: _Dataset,
    tasks: dict[int, str],
    key: str,
    name: str,
    episode: dict[str, Any],
    rows: range,
    config: LeRobotConfig,
) -> Sample:
    place = {"chunk_index": episode["data/chunk_index"], "file_index": episode["data/file_index"]}
    file = dataset.path("data_path", **place)
    inside = [key for key in dataset.cameras if key not in _videos(dataset)]
    table = _episode_rows(file, episode["episode_index"], (*_ROW, *dataset.vectors.values(), *inside))
    first, last = episode["dataset_from_index"], episode["dataset_to_index"]
    if table["index"].to_pylist() != list(range(first, last)):
        message = (
            f"{file} has {len(table)} rows of {name}, the metadata says rows {first} to {last}; it is truncated or "
            "not the file that the metadata describes: restore it"
        )
        raise Refused("inconsistent episode", message)
    stated = table["timestamp"].to_numpy().astype(np.float64)
    times_ns = sync.check_clock(sync.seconds_to_ns(stated, "timestamp", str(file)), "timestamp", f"{file}, {name}")
    where = f"{dataset.root}, {name}"
    tables = {modality: _vectors(table[feature], f"{file}, {feature}") for modality, feature in dataset.vectors.items()}
    texts = [tasks.get(task, "") for task in table["task_index"].to_pylist()]
    views, flags = [], Counter()
    for feature, camera in dataset.cameras.items():
        if feature in inside:
            view = _stored_view(table[feature], rows, feature, f"{file}, {feature}")
        else:
            view = _video_view(dataset, episode, stated[list(rows)], feature, config, flags)
        views.append(View(_member(feature), *view[:2], camera=camera_of(camera), file_ns=view[2]))
    sample = clip(key, Episode(name, times_ns, tables, texts), rows, views, config, where)
    return replace(sample, flags=sample.flags + flags)


def _member(feature: str) -> str:
    return feature.removeprefix("observation.images.").replace(".", "_").replace("/", "_").lower()


@lru_cache(maxsize=2)
def _episode_rows(file: Path, episode: int, columns: tuple[str, ...]) -> pa.Table:
    return _table(file, list(columns), filters=[("episode_index", "=", episode)])


def _vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    try:
        return np.array(column.to_pylist(), dtype=np.float64).reshape(len(column), -1)
    except (ValueError, TypeError) as error:
        raise Refused("unreadable table", f"{where} is no table of numbers ({error}); repair the file") from error


def _stored_view(column: pa.ChunkedArray, rows: range, name: str, where: str) -> tuple[str, list[bytes], None]:
    """Pictures inside parquet, as they are: structs of `bytes` and `path`."""
    pictures = [(column[row].as_py() or {}).get("bytes") for row in rows]
    if None in pictures:
        message = f"{where}: row {rows[pictures.index(None)]} holds no picture; embed the pictures or use videos"
        raise Refused("missing picture", message)
    try:
        kinds = {Image.open(io.BytesIO(picture)).format.lower() for picture in pictures}
    except (OSError, ValueError) as error:
        raise Refused("unreadable picture or video", f"{where}: {error}; repair the file") from error
    if len(kinds) > 1:
        raise Refused("unreadable picture or video", f"{where}: pictures of kinds {sorted(kinds)}; store one kind")
    return kinds.pop(), pictures, None


def _video_view(
    dataset: _Dataset,
    episode: dict[str, Any],
    seconds: np.ndarray,
    feature: str,
    config: LeRobotConfig,
    flags: Counter[str],
) -> tuple[str, list[bytes], np.ndarray]:
    """JPEGs of the frames at `seconds` [R] of the episode, and the times [R] that the file gives them."""
    chunk, number, start, stop = (episode[f"videos/{feature}/{name}"] for name in _VIDEO)
    file = dataset.path("video_path", video_key=feature, chunk_index=chunk, file_index=number)
    if not file.is_file():
        raise Refused("missing file", f"{file} does not exist; restore it or leave {feature} out of the cameras")
    video = _video(file, config.video_backend)
    start_ns, stop_ns = sync.seconds_to_ns(np.array([start, stop]), feature, str(file))
    wanted_ns = start_ns + sync.seconds_to_ns(seconds, feature, str(file))
    frames = sync.nearest(video.times_ns, wanted_ns)
    file_ns = video.times_ns[frames] - start_ns
    # Near its ends a frame of the next episode may be the nearest; the alignment check would take it within 1 ms.
    if (video.times_ns[frames] > stop_ns + sync.ALIGNMENT_NS).any():
        raise Refused(
            "inconsistent episode", f"{file}: the episode reaches beyond its end at {stop} s; repair the metadata"
        )
    pictures = [encode_jpeg(picture, config.picture_quality) for picture in video.frames(frames)]
    flags[DAMAGED] += sum(frame in video.damaged for frame in frames.tolist())
    return "jpg", pictures, file_ns


@lru_cache(maxsize=8)
def _video(file: Path, backend: Backend) -> VideoFrames:
    return VideoFrames(file, backend, str(file), key="video_backend")


SOURCE = Source(
    kind="lerobot", clock="synthetic", skew_budget_ns=0, config=LeRobotConfig, items=items, describe=describe
)
