"""Metadata of data sets: LeRobot's JSON and parquet, nuScenes' tables, rows of JSON, tars; prepared as a whole."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.errors import DataError
from mmoe.preparation.rows import make_row
from mmoe.preparation.sources import SOURCES
from mmoe.tokenizers.text import TextTokenizer
from tests.data.recordings import png
from tests.data.recordings_robot import write_bridge, write_lerobot
from tests.fuzz.mutate import damage, damage_json

TEXT = TextTokenizer.bytes()


def build(folder: Path) -> Callable[[random.Random], bytes]:
    """An input is ``<kind> <file>`` on a line, then the content that the file gets."""
    write_lerobot(folder / "whole" / "lerobot", [3, 4], stored=("observation.images.top",))
    write_bridge(folder / "whole" / "bridge", [{"steps": 3, "cameras": [0]}])
    captions = folder / "whole" / "image_caption"
    captions.mkdir(parents=True)
    rows = []
    for number in range(3):
        (captions / f"p{number}.png").write_bytes(png(np.full((8, 8, 3), number, np.uint8)))
        rows.append({"image": f"p{number}.png", "caption": f"image {number}"})
    (captions / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {
        (kind.name, file.relative_to(kind).as_posix()): file.read_bytes()
        for kind in sorted((folder / "whole").iterdir())
        for file in sorted(kind.rglob("*"))
        if file.is_file()
    }

    def make(rng: random.Random) -> bytes:
        (kind, name), data = rng.choice(list(whole.items()))
        others = list(whole.values())
        if name.endswith(".json") and rng.random() < 0.8:
            data = damage_json(json.loads(data), rng)
        elif name.endswith(".jsonl") and rng.random() < 0.8:
            lines = data.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = damage_json(json.loads(lines[at]), rng)
            data = b"\n".join(lines)
        else:
            data = damage(data, others, rng)
        return f"{kind} {name}\n".encode() + data

    return make


def run(data: bytes, folder: Path) -> None:
    head, _, content = data.partition(b"\n")
    kind, name = head.decode().split(" ")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "whole" / kind, work)
    (work / name).write_bytes(content)
    read_whole(kind, work)


def read_whole(kind: str, work: Path, **options: Any) -> None:
    """Read all that is in the folder `work` as a preparation does; what is refused must be text that can be shown."""
    source = SOURCES.find(kind)
    config = source.config(**options)
    refused: list[str] = []
    items = list(source.items(work, config, lambda key, refusal: refused.append(str(refusal))))
    names = source.described(work, config).vector_names
    for item in items:
        row = make_row(item, TEXT, "pyav", names)
        if isinstance(row, DataError):
            refused.append(str(row))
    for said in refused:
        said.encode("utf-8", "backslashreplace")
