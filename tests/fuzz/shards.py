"""A prepared source with a damaged tar, index or manifest: what can be planned is loaded, the rest is quarantined."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmoe.schema.manifest import MANIFEST
from tests.data.streams import setup
from tests.data.streams import stream as make_stream
from tests.data.synthetic import MAKERS, write_source
from tests.fuzz.mutate import damage

FILES = ("train/shard-000000.tar", "train/shard-000000.parquet", "train/shard-000001.parquet", MANIFEST)


def build(folder: Path) -> Callable[[random.Random], bytes]:
    """The first byte of an input says which file of which source its others replace."""
    for number, (name, make) in enumerate(MAKERS.items()):
        rng = np.random.default_rng(number)
        samples = {split: [make(rng, f"{name}-{split}{i}") for i in range(9)] for split in ("train", "heldout")}
        write_source(folder / "whole" / name, samples)
    setup_codec(folder / "whole")
    whole = {(name, file): (folder / "whole" / name / file).read_bytes() for name in MAKERS for file in FILES}

    def make(rng: random.Random) -> bytes:
        which = rng.randrange(len(whole))
        data = list(whole.values())[which]
        return bytes([which]) + damage(data, list(whole.values()), rng)

    return make


def setup_codec(folder: Path) -> None:
    setup(folder)  # it fits and saves the codec


def run(data: bytes, folder: Path) -> None:
    places = [(name, file) for name in MAKERS for file in FILES]
    name, file = places[data[0]]
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "whole", work)
    (work / name / file).write_bytes(data[1:])
    stream = make_stream(work, error_budget=1.0, quarantine=work / "quarantine.jsonl")
    for _, step in zip(range(3), stream.steps()):
        for batch in step.batches:
            for values in batch.values.values():
                assert values.values.isfinite().all()
            assert (batch.action_target.abs() < 1e6).all()  # NaN is not below it either
        stream.quarantine.settle(lambda counts: counts)
