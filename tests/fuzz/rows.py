"""Tables of texts, images and dialogues: CSV, parquet, Arrow, folders of `save_to_disk`; prepared as a whole."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.data.recordings import png
from tests.data.recordings_tables import hub_table, save_to_disk, write_table
from tests.fuzz.datasets import run
from tests.fuzz.mutate import damage

__all__ = ["build", "run"]


def build(folder: Path) -> Callable[[random.Random], bytes]:
    """An input is ``<kind> <file>`` on a line, then the content that the file gets."""
    whole = folder / "whole"
    for kind in ("csv", "tsv", "parquet", "stream.arrow", "file.arrow"):
        write_table(whole / f"text/rows.{kind}", {"text": [f'"row" {n},\tof {kind}' for n in range(7)]})
    cells = [{"bytes": png(np.full((8, 8, 3), n, np.uint8)), "path": f"{n}.png"} for n in range(3)]
    turns = [[{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}] for _ in cells]
    save_to_disk(whole / "chat", hub_table({"image": cells, "messages": turns}, image="Image"), shards=1)
    (whole / "image_caption").mkdir(exist_ok=True)
    table = hub_table({"image": cells, "caption": [["a", "b"], [], ["c"]]}, image="Image")
    pq.write_table(table, whole / "image_caption/rows.parquet", row_group_size=2)
    files = {
        (kind.name, file.relative_to(kind).as_posix()): file.read_bytes()
        for kind in sorted(whole.iterdir())
        for file in sorted(kind.rglob("*"))
        if file.is_file()
    }

    def make(rng: random.Random) -> bytes:
        (kind, name), data = rng.choice(list(files.items()))
        return f"{kind} {name}\n".encode() + damage(data, list(files.values()), rng)

    return make
