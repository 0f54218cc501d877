"""Reads donkeycar tubs, version 2: one camera, steering angle and throttle, on an indoor track.

A tub is one recording. Its ``_timestamp_ms`` is when the record was written, which after a conversion says nothing
of when the image was taken, so the clock is synthetic: record index / drive rate. The tub is cut into clips of
a few time slices that share no frame; a slice is the front image and the action from its record on. Clips begin
anew after a record that is deleted, missing or refused. Clip time starts at the clip's first slice.

Members of a clip: ``front-<slice>.jpg`` (the file's bytes); ``actions.npy`` [N, 2] f32, which also holds the record
before the clip (the action that was last taken) and up to `lookahead` records after it (so that an action chunk of
the last slice is whole); ``clocks.npz``, the times made here for the run of records that the clip is cut from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmoe.config.base import Config
from mmoe.data.load.media import image_size
from mmoe.data.load.reading import reading
from mmoe.errors import DataError, brief
from mmoe.preparation.clocks import SkewPolicy
from mmoe.preparation.slices import CLOCKS, Clocks, SensorStream, build_slices
from mmoe.preparation.sources import files, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.encode import encode_table
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera, Sample

PERIOD_NS = 50_000_000  # a donkeycar drives at 20 Hz
_FIELDS = ("user/angle", "user/throttle")
_IMAGE = "cam/image_array"


class DonkeycarConfig(Config):
    """Says how donkeycar tubs are cut into clips."""

    slices: int = Field(5, ge=1)  # time slices of a clip
    lookahead: int = Field(20, ge=0, le=40)  # records after a clip in its action table; within the split's gap


def items(path: Path, config: DonkeycarConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of the tub at `path`, or of every tub under it; raise DataError where there is none."""
    tubs = [path] if (path / "manifest.json").is_file() else sorted(m.parent for m in path.rglob("manifest.json"))
    if not tubs:
        raise DataError(f"{path} holds no manifest.json, so it is not a donkeycar tub (v2); give the tub's folder")
    for tub in tubs:
        name = tub.resolve().name if tub == path else tub.relative_to(path).as_posix()
        for run in _runs(_records(tub, name, quarantine)):
            actions = np.array([[record[field] for field in _FIELDS] for record in run], dtype=np.float32)
            for first in range(0, len(run), config.slices):
                last = min(first + config.slices, len(run))
                before = min(first, 1)
                table = actions[first - before : last + config.lookahead]
                images = tuple(tub / "images" / record[_IMAGE] for record in run[first:last])
                index = run[first]["_index"]
                key = f"{name}-{index:06d}"
                yield Item(
                    key,
                    name,
                    partial(_clip, key, name, images, table, before, _Place(run[0]["_index"], first, len(run))),
                    start=index * PERIOD_NS,
                    stop=(run[last - 1]["_index"] + 1) * PERIOD_NS,
                )


def _records(tub: Path, name: str, quarantine: Refuse) -> Iterator[dict[str, Any]]:
    """The usable records of a tub in order of their index."""
    manifest = tub / "manifest.json"
    with reading("manifest of a tub v2", str(manifest), "convert the tub with `donkey tubconvert` or restore the file"):
        rows = [
            jsonl.parse(line, str(manifest)) for line in jsonl.decode_text(_read(manifest), manifest, 0).splitlines()
        ]
        catalogs, deleted = rows[4]["paths"], set(rows[4]["deleted_indexes"])
        if not isinstance(catalogs, list) or not all(isinstance(name, str) for name in catalogs):
            raise ValueError(f"paths is {brief(catalogs)}")
    for catalog in catalogs:
        for where, row in jsonl.rows(tub / catalog, quarantine):
            try:
                if jsonl.integer_of(row, "_index", where) not in deleted:
                    yield _checked(row, where)
            except Refused as refusal:
                quarantine(f"{name}-{brief(row.get('_index', where))}", refusal)


def _read(manifest: Path) -> bytes:
    return files.read_bytes(manifest, "the tub's folder")


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    jsonl.text_of(row, _IMAGE, where)
    for field in _FIELDS:
        if type(row.get(field)) is float and not math.isfinite(row[field]):
            message = f"{where}: {field!r} is {row[field]}; repair the reading or delete the record from the tub"
            raise Refused("reading is not finite", message)
        jsonl.number_of(row, field, where)
    return row


def _runs(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Maximal runs of records with consecutive indices."""
    run: list[dict[str, Any]] = []
    for record in records:
        if run and record["_index"] != run[-1]["_index"] + 1:
            yield run
            run = []
        run.append(record)
    if run:
        yield run


@dataclass(frozen=True)
class _Place:
    """Where a clip lies in its run: index of the run's first record, the clip's first record in it, their number."""

    index: int
    first: int
    records: int


def _clip(key: str, recording: str, images: tuple[Path, ...], table: np.ndarray, before: int, place: _Place) -> Sample:
    members, names, sizes = {}, [], []
    for number, file in enumerate(images):
        image = files.read_bytes(file, "its record in the tub")
        names.append(f"front-{number}{file.suffix.lower()}")
        sizes.append(image_size(image, str(file)))
        members[names[-1]] = image
    frames_ns = PERIOD_NS * np.arange(len(images), dtype=np.int64)
    actions_ns = PERIOD_NS * np.arange(-before, len(table) - before, dtype=np.int64)
    streams = [
        SensorStream("front", Modality.VISION, frames_ns, names, max_gap_ns=0, camera=Camera.FRONT, size=sizes),
        SensorStream("actions", Modality.ACTION, actions_ns, "actions.npy", max_gap_ns=0, choice="first"),
    ]
    slices = build_slices(frames_ns, streams, SkewPolicy(budget_ns=0), key)
    members["actions.npy"] = encode_table(table)
    run_ns = PERIOD_NS * np.arange(-place.first, place.records - place.first, dtype=np.int64)
    log = f"{recording}-{place.index:06d}"
    clocks = Clocks(log, "synthetic", "front", {"front": run_ns, "actions": run_ns}, PERIOD_NS * place.first)
    members[CLOCKS] = clocks.to_bytes()
    return Sample(key, recording, members, slices.segments, slices.flags)


SOURCE = Source(
    kind="donkeycar",
    clock="synthetic",
    skew_budget_ns=0,
    config=DonkeycarConfig,
    items=items,
    vector_names={"ACTION": ("steering", "throttle")},
    action_period_ns=PERIOD_NS,
)
