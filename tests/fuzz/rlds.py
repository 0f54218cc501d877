"""Episodes of RLDS: examples damaged under a checksum that is right, tfrecord files and their descriptions."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.data.recordings_rlds import episode, example, record, sequence, step_features, tensor, write_rlds
from tests.fuzz.datasets import read_whole
from tests.fuzz.mutate import damage, damage_json

RECORDS = "arm-train.tfrecord-00000-of-00001"
_MOST = 20_000  # the checksum is made bit by bit


def build(folder: Path) -> Callable[[random.Random], bytes]:
    """An input is the name of a file on a line, then the content that it gets."""
    ragged = {"steps/joints/ragged_flat_values": [0.5] * 4, "steps/joints/ragged_row_lengths_0": [2, 2]}
    lists = [{key: values[:9] for key, values in episode(n, 2).items()} | ragged for n in (0, 1)]
    write_rlds(folder / "whole", {"train": [lists]}, steps=step_features(joints=sequence(tensor(), 2)))
    whole = {file.name: file.read_bytes() for file in sorted((folder / "whole").iterdir())}
    examples = [example(each) for each in lists]

    def make(rng: random.Random) -> bytes:
        kind = rng.randrange(4)
        if kind < 2:
            data = damage(examples[0], examples, rng)[:_MOST]
            return f"{RECORDS}\n".encode() + record(data)
        if kind == 2:
            return f"{RECORDS}\n".encode() + damage(whole[RECORDS], [whole[RECORDS]], rng)
        name = rng.choice(("features.json", "dataset_info.json"))
        return f"{name}\n".encode() + damage_json(json.loads(whole[name]), rng)

    return make


def run(data: bytes, folder: Path) -> None:
    head, _, content = data.partition(b"\n")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "whole", work)
    (work / head.decode()).write_bytes(content)
    read_whole("rlds", work, rate_hz=5, state=("observation/state", "joints"))
