"""Reads episodes of RLDS as tensorflow-datasets writes them (tfrecord files), as BridgeData and Open X-Embodiment come.

`input` is the folder of a version: ``dataset_info.json``, ``features.json`` and files as
``<name>-<split>.tfrecord-00000-of-00001``. Each example is an episode, and `steps` a sequence of its steps. Features
have the names that they have inside of a step, as ``observation/image_0``. Several can be joined into one state or
action, in the order given. Dimensions have the names of the options, or else the last part of the feature's name and a
number.

RLDS says that the action of a step marked `is_last` is none, and it is left out, unless `last_action` says that the
writer put a command there too. Where ``episode_metadata/has_<camera>`` is false the images of that camera are blank,
and the camera is absent from the episode. Nothing says when a step was: the times are made from `rate_hz`, and the
clock is synthetic. What is cut from an episode is said in `episodes.py`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from pydantic import Field

from mmoe.data.load.reading import reading
from mmoe.errors import DataError, counted_as, did_you_mean
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source, Vectors
from mmoe.preparation.sources.episodes import Episode, EpisodeConfig, View, clip, stored_kind, windows
from mmoe.preparation.sources.rlds_features import STEPS, Feature, TfdsSplit, read_splits, read_step_features
from mmoe.preparation.sources.tfrecord import DAMAGED, ListValues, Record, records
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample

_FASTEST = 10_000  # Hz
_LONGEST = 1 << 24  # steps of an episode; more is damage, and would be that many clips
_INCONSISTENT = "inconsistent episode"
_LAST = f"{STEPS}/is_last"


class RldsConfig(EpisodeConfig):
    """Says which features of the steps are read, and how episodes are cut.

    Image features that `cameras` leaves out are not read; without it (null) the only one is, of no camera.
    """

    rate_hz: float | None = Field(None, gt=0, le=_FASTEST)  # steps a second, which no file says; it must be given
    splits: tuple[str, ...] = Field(("train",), min_length=1)  # that are read, held out or not as any recordings
    state: tuple[str, ...] = ("observation/state",)  # joined into one vector; []: none
    action: tuple[str, ...] = ("action",)  # joined likewise
    instruction: str | None = "language_instruction"  # null: none
    state_names: tuple[str, ...] | None = None  # of the dimensions, all of them; null: numbered
    action_names: tuple[str, ...] | None = None  # of the dimensions, all of them; null: numbered
    last_action: bool = False  # whether a step marked is_last has an action


@dataclass(frozen=True)
class _DataSet:
    """What is read of a data set: `has` names, by camera, the feature of an episode that says whether it is there."""

    root: Path
    splits: list[TfdsSplit]
    unread: list[TfdsSplit]
    cameras: dict[Feature, str | None]
    has: dict[Feature, str]
    vectors: dict[Modality, list[Feature]]
    instruction: Feature | None
    ends: bool  # whether steps say that they are the last one
    period_ns: float

    @property
    def counted(self) -> tuple[str, int]:
        """The key of a list that every episode must have, and how many of its values make a step."""
        if self.cameras:
            return next(iter(self.cameras)).key, 1
        feature = next(iter(self.vectors.values()))[0]
        assert feature.size  # as `_open` has seen
        return feature.key, feature.size


def items(path: Path, config: RldsConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of every episode, split by split and file by file."""
    data_set = _open(path, config)
    for split in data_set.splits:
        for shard, (file, length) in enumerate(split.files):
            found = 0
            try:
                for record in records(file):
                    found += 1
                    name = f"{split.name}-{shard:05d}-{record.number:06d}"
                    try:
                        steps = _steps(data_set, record)
                    except Refused as refusal:
                        quarantine(name, refusal)
                        continue
                    for rows in windows(steps, config):
                        key = f"{name}-{rows[0]:06d}"
                        yield Item(key, name, partial(_clip, data_set, record, key, name, steps, rows, config))
                if found != length:
                    message = f"{file} has {found} episodes, dataset_info.json says {length}; restore one of them"
                    raise Refused(_INCONSISTENT, message)
            except OSError as error:
                message = f"{file} cannot be read ({error.strerror}), and its {length} episodes are missing; restore it"
                quarantine(file.name, Refused("missing file", message))
            except Refused as refusal:
                lost = f" ({max(length - found, 0)} of its {length} episodes are not read)" if found != length else ""
                quarantine(file.name, Refused(refusal.reason, f"{refusal}{lost}"))
    named = {file.name for split in (*data_set.splits, *data_set.unread) for file, _ in split.files}
    for file in sorted(path.glob("*.tfrecord*")):
        if file.name not in named:
            message = f"{file} belongs to no split of dataset_info.json; restore that, or remove the file"
            quarantine(file.name, Refused("file of no split", message))


def describe(path: Path, config: RldsConfig) -> Vectors:
    """Return the names of the dimensions, the period of the rows, and which splits are not read."""
    data_set = _open(path, config)
    given = {Modality.STATE: config.state_names, Modality.ACTION: config.action_names}
    names = {}
    for modality, features in data_set.vectors.items():
        numbered = tuple(f"{f.name.rpartition('/')[2]}_{number}" for f in features for number in range(f.size or 0))
        chosen = numbered if given[modality] is None else tuple(given[modality] or ())
        if len(chosen) != len(numbered) or len(set(chosen)) != len(chosen):
            key = f"{modality.name.lower()}_names"
            raise DataError(
                f"{path}: {key} has {len(set(chosen))} different names, but {' + '.join(f.name for f in features)} has "
                f"{len(numbered)} dimensions; set the option {key} to one name each"
            )
        names[modality.name] = chosen
    notes = [
        f"split {split.name} ({split.episodes} episodes) is not read; name it in splits to read it too"
        for split in data_set.unread
    ]
    return Vectors(names, round(data_set.period_ns) if config.action else 0, tuple(notes))


def _open(path: Path, config: RldsConfig) -> _DataSet:
    splits = read_splits(path)
    features, episode = read_step_features(path)
    if config.rate_hz is None:
        raise DataError(
            f"{path}: no file of RLDS says how fast its steps were; set rate_hz, as rate_hz=5 for BridgeData"
        )
    for name in config.splits:
        if name not in splits:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(splits)}: set the option splits")
    images = [name for name, feature in features.items() if feature.is_image]
    if len(images) > 1 and config.cameras is None:
        raise DataError(
            f"{path} has the cameras {', '.join(images)}; say by the option cameras which camera of the rig "
            f'each is, so that the model can tell them apart, as cameras={{"{images[0]}": front, ...}} (other names '
            "than those of a car in rig.cameras), or cameras={} to read no images"
        )

    def chosen(option: str, name: str, fits: str) -> Feature:
        if name not in features:
            near = did_you_mean(name, features)
            raise DataError(
                f"{path}: a step has no feature {name!r}{near or ';'} it has {', '.join(features)}: set {option}"
            )
        if not getattr(features[name], fits):
            raise DataError(f"{path}: {_cannot(features[name], fits)}; correct the option {option}")
        return features[name]

    cameras: dict[str, str | None] = dict.fromkeys(images) if config.cameras is None else config.cameras
    read = {chosen("cameras", name, "is_image"): camera for name, camera in cameras.items()}
    asked = {Modality.STATE: config.state, Modality.ACTION: config.action}
    vectors = {
        modality: [chosen(modality.name.lower(), name, "is_vector") for name in names]
        for modality, names in asked.items()
        if names
    }
    if not read and not vectors:
        raise DataError(f"{path}: the options cameras, state and action leave nothing to read; name one of them")
    text = None if config.instruction is None else chosen("instruction (null: none)", config.instruction, "is_text")
    has = {feature: f"episode_metadata/has_{feature.name.rpartition('/')[2]}" for feature in read}
    return _DataSet(
        path,
        [splits[name] for name in config.splits],
        [split for name, split in splits.items() if name not in config.splits],
        read,
        {feature: key for feature, key in has.items() if key in episode},
        vectors,
        text,
        "is_last" in features and not config.last_action,
        1e9 / config.rate_hz,
    )


def _cannot(feature: Feature, fits: str) -> str:
    shape = [*feature.rows, *feature.shape]
    what = {"is_image": "an image", "is_text": "a text", "is_vector": "a fixed number of numbers"}[fits]
    said = f"feature {feature.name!r} ({feature.kind} of {feature.dtype or 'no type'}, shape {shape}"
    return f"{said}{', ' + feature.encoding if feature.encoding != 'none' else ''}) is not {what} in each step"


def _steps(data_set: _DataSet, record: Record) -> int:
    """The number of steps of an episode, of which little is read."""
    key, size = data_set.counted
    count = record.count(key)
    if count is None:
        raise Refused("no such column", f"{record.where} has no {key}, which features.json names; correct one of them")
    if count % size or not 0 < count // size <= _LONGEST:
        raise Refused(
            _INCONSISTENT, f"{record.where}: {key} has {count} values, which is no number of steps; restore it"
        )
    return count // size


def _clip(
    data_set: _DataSet, record: Record, key: str, name: str, steps: int, rows: range, config: RldsConfig
) -> Sample:
    lists = _example(record)
    flags: Counter[str] = Counter()
    views = []
    for feature, camera in data_set.cameras.items():
        member = feature.name.removeprefix("observation/").replace(".", "_").replace("/", "_").lower()
        if feature in data_set.has and not _numbers(record, lists, data_set.has[feature], 1).all():
            flags[f"{member}: absent from its episode"] += 1
            continue
        where = f"{record.where}, {feature.key}"
        stored = _strings(record, lists, feature.key, steps)
        images = [stored[row] for row in rows]
        with counted_as("unreadable image or video"):
            views.append(View(member, stored_kind(images, where), images, config.rig.number(camera)))
    tables = {}
    for modality, features in data_set.vectors.items():
        columns = [_table(record, lists, feature, steps) for feature in features]
        tables[modality] = np.concatenate(columns, axis=1)
    if Modality.ACTION in tables and data_set.ends and _numbers(record, lists, _LAST, steps)[-1]:
        tables[Modality.ACTION] = tables[Modality.ACTION][:-1]
        if rows[-1] == steps - 1:
            flags["action of the last step: left out"] += 1
    texts = []
    if data_set.instruction is not None:
        spoken = _strings(record, lists, data_set.instruction.key, steps)
        with reading("text", f"{record.where}, {data_set.instruction.key}", "convert it to UTF-8", "text is not UTF-8"):
            texts = [text.decode() for text in spoken]
    if not views and not any(map(len, tables.values())):
        raise Refused(
            "nothing observed", f"{record.where}: no camera of the option cameras is in it, nor a state or action"
        )
    times_ns = np.rint(np.arange(steps) * data_set.period_ns).astype(np.int64)
    sample = clip(key, Episode(name, times_ns, tables, texts), rows, views, config, record.where)
    return replace(sample, flags=sample.flags + flags)


@lru_cache(maxsize=2)
def _example(record: Record) -> dict[str, ListValues]:
    return record.example()


def _table(record: Record, lists: dict[str, ListValues], feature: Feature, steps: int) -> np.ndarray:
    count = steps
    for depth, length in enumerate(feature.rows):
        lengths = _numbers(record, lists, feature.row_lengths(depth), count)
        if (lengths != length).any():
            message = (
                f"{record.where}: rows of {feature.name} have lengths {sorted(set(lengths.tolist()))}, not {length}"
            )
            raise Refused(_INCONSISTENT, f"{message}; restore it")
        count *= length or 0
    assert feature.size  # as `_open` has seen
    return _numbers(record, lists, feature.key, steps * feature.size).reshape(steps, -1).astype(np.float64)


def _numbers(record: Record, lists: dict[str, ListValues], key: str, count: int) -> np.ndarray:
    values = _values(record, lists, key, "numbers")
    with reading("list of numbers", f"{record.where}, {key}", "restore the file", DAMAGED):
        numbers = values.numbers()
    _check_count(record, key, len(numbers), count)
    return numbers


def _strings(record: Record, lists: dict[str, ListValues], key: str, count: int) -> list[bytes]:
    values = _values(record, lists, key, "bytes")
    with reading("list of bytes", f"{record.where}, {key}", "restore the file", DAMAGED):
        strings = values.byte_strings()
    _check_count(record, key, len(strings), count)
    return strings


def _values(record: Record, lists: dict[str, ListValues], key: str, what: str) -> ListValues:
    if key not in lists:
        raise Refused("no such column", f"{record.where} has no {key}, which features.json names; correct one of them")
    if (lists[key].kind == "bytes") != (what == "bytes"):
        found = f"{record.where}: {key} holds {lists[key].kind} and not {what}"
        raise Refused(_INCONSISTENT, f"{found}; correct features.json")
    return lists[key]


def _check_count(record: Record, key: str, found: int, count: int) -> None:
    if found != count:
        message = f"{record.where}: {key} has {found} values where its steps have {count}; restore the file"
        raise Refused(_INCONSISTENT, message)


SOURCE = Source(kind="rlds", clock="synthetic", skew_budget_ns=0, config=RldsConfig, items=items, describe=describe)
