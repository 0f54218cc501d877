"""Reads LeRobot datasets, version 3.0: robot episodes in parquet, with videos that hold many episodes end to end.

`input` is the dataset's folder (``meta/info.json``). The image of a row is the frame of each video at the
episode's `from_timestamp` + the row's `timestamp`; it must be there to 1 ms. Images may also stand inside parquet
(features of dtype ``image``). State and action are the features that the options name; their dimensions have the
names of ``info.json``. The instruction of a row is its task. A row's time is its number / fps, made by the writer: the
clock is synthetic and says nothing of how far sensors were apart. A name that occurs again among the dimensions
(two arms with the same joints) is numbered from its second occurrence on: `gripper`, `gripper_2`. What is cut from an
episode, and how the ends are padded, is said in `episodes.py`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmoe.data.load.frames import DAMAGED, VideoFrames
from mmoe.data.load.reading import reading
from mmoe.data.load.video import VideoBackend
from mmoe.errors import DataError, brief
from mmoe.preparation.clocks import check_clock, nearest, seconds_to_ns
from mmoe.preparation.sources import jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source, Vectors
from mmoe.preparation.sources.encode import encode_jpeg
from mmoe.preparation.sources.episodes import Episode, EpisodeConfig, View, clip, stored_kind, windows
from mmoe.preparation.sources.files import open_regular
from mmoe.schema.modality import Modality
from mmoe.schema.sample import ALIGNMENT_NS, Sample

VERSION = "v3.0"
_CONVERT = "convert it with `python -m lerobot.datasets.v30.convert_dataset_v21_to_v30`"
_EPISODE = ("episode_index", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")
_FASTEST = 10_000  # Hz
_MOST, _LONGEST = 1 << 31, 1 << 24  # episodes, and rows of one; more is damage, and would be that many items
_ROW = ("timestamp", "frame_index", "index", "task_index")


class LeRobotConfig(EpisodeConfig):
    """Says which features of a LeRobot dataset are read, and how its episodes are cut.

    Image features that `cameras` leaves out are not read; without it (null) the only one is, of no camera.
    """

    state: str | None = "observation.state"  # null: none
    action: str | None = "action"  # null: none
    video_backend: VideoBackend = "auto"  # decord: what it is proven to read, the rest is refused
    image_quality: int = Field(95, ge=1, le=100)  # JPEG, of the frames taken from videos


@dataclass(frozen=True)
class _Dataset:
    """`info.json`, and the features that are read."""

    root: Path
    info: dict[str, Any]
    cameras: dict[str, str | None]
    vectors: dict[Modality, str]

    @property
    def fps(self) -> float:
        return self.info["fps"]

    def path(self, template: str, **place: Any) -> Path:
        with reading("description of a LeRobot dataset", str(self.root / "meta/info.json"), f"repair its {template}"):
            return self.root / self.info[template].format(**place)


def items(path: Path, config: LeRobotConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of every episode, in the order of ``meta/episodes``."""
    dataset = _open(path, config)
    tasks = _tasks(path)
    columns = [*_EPISODE, *(f"videos/{key}/{name}" for key in _videos(dataset) for name in _VIDEO)]
    for file in sorted((path / "meta/episodes").rglob("*.parquet")):
        for number, episode in enumerate(_table(file, columns).to_pylist()):
            try:
                _check_episode(episode, columns)
            except (TypeError, ValueError) as error:
                message = f"{file}: row {number} is no episode ({error}); repair the metadata"
                quarantine(f"{file.stem}-row-{number}", Refused("inconsistent episode", message))
                continue
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
    """Return the dimensions' names as ``info.json`` gives them, and 1 / fps as the period of actions."""
    dataset = _open(path, config)
    stated = {key: _names(dataset, key) for key in dataset.vectors.values()}
    notes = tuple(
        f"{key}: names repeat in info.json ({', '.join(names)}); they are numbered: {', '.join(_numbered(names))}"
        for key, names in stated.items()
        if len(set(names)) < len(names)
    )
    names = {modality.name: _numbered(stated[key]) for modality, key in dataset.vectors.items()}
    return Vectors(names, round(1e9 / dataset.fps) if config.action else 0, notes)


_VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def suggest(path: Path) -> dict[str, Any]:
    """Name the cameras of a dataset that has several as its features are named, and leave out vectors it has not."""
    features = _info(path)["features"]
    absent = {key: None for key in ("state", "action") if LeRobotConfig.model_fields[key].default not in features}
    images = _images(features)
    if len(images) < 2:
        return absent
    names = [re.sub(r"[^a-z0-9]+", "_", _member(key)).strip("_") for key in images]
    cameras = [name if name[:1].isalpha() else f"camera_{name}" for name in names]
    if len(set(cameras)) < len(cameras):
        cameras = [f"camera_{number}" for number in range(len(images))]
    return absent | {"rig": {"cameras": cameras}, "cameras": dict(zip(images, cameras, strict=True))}


def _info(path: Path) -> dict[str, Any]:
    file = path / "meta/info.json"
    info = jsonl.load_json(file, "give the folder of a LeRobot dataset")
    with reading("description of a LeRobot dataset", str(file), "restore it"):
        version = info["codebase_version"]
        if version != VERSION:
            raise DataError(f"{path} is a LeRobot dataset {version}; only {VERSION} is read: {_CONVERT}")
        _check_info(info)
    return info


def _images(features: dict[str, Any]) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]


def _open(path: Path, config: LeRobotConfig) -> _Dataset:
    info = _info(path)
    features, images = info["features"], _images(info["features"])
    if len(images) > 1 and config.cameras is None:
        raise DataError(
            f"{path} has the cameras {', '.join(images)}; say by the option cameras which camera of the rig "
            f'each is, so that the model can tell them apart, as cameras={{"{images[0]}": front, ...}} (other names '
            "than those of a car in rig.cameras), or cameras={} to read no images"
        )
    cameras: dict[str, str | None] = dict.fromkeys(images) if config.cameras is None else config.cameras
    chosen = {Modality.STATE: config.state, Modality.ACTION: config.action}
    vectors = {modality: key for modality, key in chosen.items() if key is not None}
    wanted = [*cameras, *vectors.values()]
    for key in wanted:
        if key not in features:
            raise DataError(
                f"{path} has no feature {key!r}; it has {', '.join(features)}: set the options cameras, state, action"
            )
    for key in cameras:
        if key not in images:
            raise DataError(f"{path}: feature {key!r} is {features[key]['dtype']}, not images; correct cameras")
    if not cameras and not vectors:
        raise DataError(f"{path}: the options cameras, state and action leave nothing to read; name one of them")
    return _Dataset(path, info, cameras, vectors)


def _check_info(info: dict[str, Any]) -> None:
    """Raise ValueError where what is read of `info.json` is not of the type that the format says."""
    fps = info["fps"]
    if not jsonl.is_number(fps) or not 0 < fps <= _FASTEST:
        raise ValueError(f"fps is {brief(fps)}, not a rate up to {_FASTEST} Hz")
    for key, feature in info["features"].items():
        shape = feature["shape"]
        if not isinstance(feature["dtype"], str) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"feature {key!r} has dtype {feature['dtype']!r} and shape {brief(shape)}")
    for template in ("data_path", "video_path"):
        if not isinstance(info.get(template, ""), str | None):
            raise ValueError(f"{template} is {brief(info[template])}")


def _check_episode(episode: dict[str, Any], columns: list[str]) -> None:
    """Raise ValueError where a row of ``meta/episodes`` holds another type than the format says, or nothing."""
    for column in columns:
        kind = (int, float) if column.endswith("_timestamp") else int
        if not isinstance(episode[column], kind):
            raise ValueError(f"{column} is {brief(episode[column])}")
    if not 0 <= episode["episode_index"] < _MOST:
        raise ValueError(f"episode_index is {episode['episode_index']}")
    if episode["dataset_to_index"] - episode["dataset_from_index"] > _LONGEST:
        raise ValueError(f"it has {episode['dataset_to_index'] - episode['dataset_from_index']} rows")


def _names(dataset: _Dataset, key: str) -> tuple[str, ...]:
    """A feature's dimensions as stated: a list, a mapping of names to lists or to columns, or none (then numbered)."""
    feature = dataset.info["features"][key]
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 1:
        raise DataError(f"{dataset.root}: feature {key!r} has shape {shape}; only vectors can be state or action")
    if isinstance(names, dict):
        lists = [value for value in names.values() if isinstance(value, list)]
        names = [name for held in lists for name in held] if lists else list(names)
    if names is None:
        names = [f"{key.rpartition('.')[2]}_{number}" for number in range(shape[0])]
    if not isinstance(names, list) or len(names) != shape[0]:
        raise DataError(f"{dataset.root}: feature {key!r} has shape {shape} but names {names}; correct info.json")
    return tuple(str(name) for name in names)


def _numbered(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names with a number behind those that occurred before; columns of one name would be one dimension."""
    given, unique = set(names), []
    for name in names:
        number, new = 1, name
        while new in unique or (number > 1 and new in given):
            number += 1
            new = f"{name}_{number}"
        unique.append(new)
    return tuple(unique)


def _videos(dataset: _Dataset) -> list[str]:
    return [key for key in dataset.cameras if dataset.info["features"][key]["dtype"] == "video"]


def _tasks(path: Path) -> dict[int, str]:
    """Task text by number; the text is the table's index, which pandas may have named in several ways."""
    file = path / "meta/tasks.parquet"
    table = _table(file, None)
    with reading("table of tasks", str(file), "restore it"):
        kinds = {name: table.schema.field(name).type for name in table.column_names}
        texts = [name for name, kind in kinds.items() if pa.types.is_string(kind)]
        texts += [name for name, kind in kinds.items() if pa.types.is_large_string(kind)]
        if not texts or not pa.types.is_integer(kinds.get("task_index", pa.null())):
            raise ValueError(f"its columns are {kinds}, not a text and task_index")
        tasks = dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist()))
    return {number: text or "" for number, text in tasks.items()}


def _table(file: Path, columns: list[str] | None, **rows: Any) -> pa.Table:
    with reading("table", str(file), "restore it, or prepare without it"):
        open_regular(file).close()
        table = pq.read_table(file, columns=columns, partitioning=None, **rows)
        if missing := [name for name in columns or () if name not in table.column_names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        return table


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
    with reading("table", f"{file}, {name}", "repair its times"):
        stated = table["timestamp"].to_numpy().astype(np.float64)
    times_ns = check_clock(seconds_to_ns(stated, "timestamp", str(file)), "timestamp", f"{file}, {name}")
    where = f"{dataset.root}, {name}"
    tables = {modality: _vectors(table[feature], f"{file}, {feature}") for modality, feature in dataset.vectors.items()}
    texts = [tasks.get(task, "") for task in table["task_index"].to_pylist()]
    views = []
    flags: Counter[str] = Counter()
    view: tuple[str, list[bytes], np.ndarray | None]
    for feature, camera in dataset.cameras.items():
        if feature in inside:
            view = _stored_view(table[feature], rows, feature, f"{file}, {feature}")
        else:
            view = _video_view(dataset, episode, stated[list(rows)], feature, config, flags)
        views.append(View(_member(feature), *view[:2], camera=config.rig.number(camera), file_ns=view[2]))
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
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused("unreadable table", f"{where} is no table of numbers ({error}); repair the file") from error


def _stored_view(column: pa.ChunkedArray, rows: range, name: str, where: str) -> tuple[str, list[bytes], None]:
    """Images inside parquet, as they are: structs of `bytes` and `path`."""
    images = [column[row].as_py() for row in rows]
    images = [image.get("bytes") if isinstance(image, dict) else None for image in images]
    if not all(isinstance(image, bytes) for image in images):
        row = next(row for row, image in zip(rows, images) if not isinstance(image, bytes))
        message = f"{where}: row {row} holds no image; embed the images or use videos"
        raise Refused("missing image", message)
    return stored_kind(images, where), images, None


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
    start_ns, stop_ns = seconds_to_ns(np.array([start, stop]), feature, str(file))
    wanted_ns = start_ns + seconds_to_ns(seconds, feature, str(file))
    frames = nearest(video.times_ns, wanted_ns)
    file_ns = video.times_ns[frames] - start_ns
    # Near its ends a frame of the next episode may be the nearest; the alignment check would take it within 1 ms.
    if (video.times_ns[frames] > stop_ns + ALIGNMENT_NS).any():
        raise Refused(
            "inconsistent episode", f"{file}: the episode reaches beyond its end at {stop} s; repair the metadata"
        )
    images = [encode_jpeg(image, config.image_quality) for image in video.frames(frames)]
    flags[DAMAGED] += sum(frame in video.damaged for frame in frames.tolist())
    return "jpg", images, file_ns


@lru_cache(maxsize=8)
def _video(file: Path, backend: VideoBackend) -> VideoFrames:
    return VideoFrames(file, backend, str(file), key="video_backend")


SOURCE = Source(
    kind="lerobot",
    clock="synthetic",
    skew_budget_ns=0,
    config=LeRobotConfig,
    items=items,
    describe=describe,
    suggest=suggest,
)
