"""Reads BridgeData V2 episodes, unpacked: a robot arm at 5 Hz, up to several cameras, an instruction.

The input is a folder with ``episodes.jsonl``, rows ``{"episode": folder, "steps": N, "cameras": [numbers],
"language_instruction": text}``; the folder of an episode holds ``steps.npz`` (`state` and `action`, [N, 7]) and
``image_<camera>_<step>.jpg``. A camera that an episode does not list is absent from its slices. There are no times:
BridgeData was recorded at 5 Hz, and the clock made from that is synthetic.

The state is the pose of the gripper (m, rad) and how far it is open (1 open). The action of step t is the change of
pose that was commanded at t, about ``state[t + 1] - state[t]``, except that its last dimension is where the gripper
shall be (1 open, 0 closed). What is cut from an episode is said in `episodes.py`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmoe.data.load.tables import load_npz
from mmoe.errors import DataError, brief
from mmoe.preparation.sources import files, jsonl
from mmoe.preparation.sources.base import Item, Refuse, Refused, Source
from mmoe.preparation.sources.episodes import Episode, EpisodeConfig, View, clip, windows
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample

PERIOD_NS = 200_000_000
_LONGEST = 1 << 24  # steps of an episode; more is a slip of the pen, and would be that many clips
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")


class BridgeConfig(EpisodeConfig):
    """Says how Bridge episodes are read."""

    # By number of a view, the camera whose token and embedding it takes; null: none.
    cameras: dict[str, str | None] = Field(
        {"0": "front", "1": "front_left", "2": "front_right", "3": "back"}, min_length=1
    )


def items(path: Path, config: BridgeConfig, quarantine: Refuse) -> Iterator[Item]:
    """List the clips of every episode that ``episodes.jsonl`` in the folder `path` names."""
    named = set()
    for where, row in jsonl.rows(path / "episodes.jsonl", quarantine):
        try:
            name = jsonl.name_of(row, "episode", where)
            named.add(path / name)
            steps, cameras = _checked(row, config, where)
            text = row.get("language_instruction") or ""
            if not isinstance(text, str):
                message = f"{where}: 'language_instruction' is {brief(text)}, not a string; repair the line"
                raise Refused("malformed row", message)
        except Refused as refusal:
            quarantine(brief(row.get("episode", where)).strip("'"), refusal)
            continue
        for rows in windows(steps, config):
            key = f"{name}-{rows[0]:04d}"
            yield Item(key, name, partial(_clip, path / name, key, name, steps, rows, cameras, text, config))
    for folder in sorted({steps.parent for steps in path.rglob("steps.npz")} - named):
        message = f"{folder} is an episode that episodes.jsonl does not name; add a line, or remove it"
        quarantine(folder.relative_to(path).as_posix(), Refused("episode without line", message))


def _checked(row: dict[str, Any], config: BridgeConfig, where: str) -> tuple[int, list[int]]:
    steps, cameras = row.get("steps"), row.get("cameras")
    if (
        type(steps) is not int
        or not 1 <= steps <= _LONGEST
        or not isinstance(cameras, list)
        or any(type(camera) is not int for camera in cameras)
    ):
        said = f"steps {brief(steps)} and cameras {brief(cameras)}"
        message = f"{where}: {said} are not a count and a list of numbers; repair it"
        raise Refused("malformed row", message)
    unknown = [camera for camera in cameras if str(camera) not in config.cameras]
    if unknown:
        message = f"{where}: camera {unknown[0]} is not in the option cameras ({', '.join(config.cameras)}); add it"
        raise Refused("unknown camera", message)
    return steps, cameras


def _clip(
    folder: Path,
    key: str,
    name: str,
    steps: int,
    rows: range,
    cameras: list[int],
    text: str,
    config: BridgeConfig,
) -> Sample:
    tables = _tables(folder / "steps.npz", steps)
    views = []
    for camera in cameras:
        shown = [folder / f"image_{camera}_{row:02d}.jpg" for row in rows]
        images = [files.read_bytes(file, "episodes.jsonl") for file in shown]
        views.append(View(f"image_{camera}", "jpg", images, config.rig.number(config.cameras[str(camera)])))
    times_ns = PERIOD_NS * np.arange(steps, dtype=np.int64)
    return clip(key, Episode(name, times_ns, tables, [text] * steps), rows, views, config, str(folder))


def _tables(file: Path, steps: int) -> dict[Modality, np.ndarray]:
    try:
        arrays = load_npz(files.read_bytes(file, "episodes.jsonl"), str(file), ("state", "action"))
    except DataError as error:
        message = f"{error}; otherwise remove the episode's line"
        raise Refused("unreadable steps", message) from error
    tables = {Modality.STATE: arrays["state"], Modality.ACTION: arrays["action"]}
    for modality, table in tables.items():
        if table.dtype.kind not in "fiu":
            raise Refused("unreadable steps", f"{file}: {modality.name.lower()} holds {table.dtype}, not numbers")
        if table.shape != (steps, 7):
            message = (
                f"{file}: {modality.name.lower()} has shape {list(table.shape)}, episodes.jsonl says [{steps}, 7]; "
                "restore the file or correct the line"
            )
            raise Refused("unreadable steps", message)
    return tables


SOURCE = Source(
    kind="bridge",
    clock="synthetic",
    skew_budget_ns=0,
    config=BridgeConfig,
    items=items,
    vector_names={
        "STATE": (*_POSE, "gripper"),
        "ACTION": (*(f"delta_{name}" for name in _POSE), "gripper"),
    },
    action_period_ns=PERIOD_NS,
)
