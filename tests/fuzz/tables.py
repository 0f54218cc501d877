"""Tables and clocks: ``.npy`` and ``.npz`` bytes."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmoe.data.load.tables import load_array
from mmoe.preparation.slices import Clocks
from tests.fuzz.mutate import damage


def build(_: Path) -> Callable[[random.Random], bytes]:
    table = np.arange(24.0).reshape(8, 3)
    seeds = []
    for array in (table, table.astype(np.float32), np.asfortranarray(table), table.astype(">i2"), table[:, 0]):
        buffer = io.BytesIO()
        np.save(buffer, array)
        seeds.append(buffer.getvalue())
    for version in ((1, 0), (2, 0), (3, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, table, version=version)
        seeds.append(buffer.getvalue())
    clocks = Clocks("log", "captured", "front", {"front": np.arange(9), "imu": np.arange(90)}, 7)
    seeds += [clocks.to_bytes()] * 4
    buffer = io.BytesIO()
    np.savez(buffer, state=table, action=table)
    seeds.append(buffer.getvalue())
    return lambda rng: damage(rng.choice(seeds), seeds, rng)


def run(data: bytes, _: Path) -> None:
    Clocks.from_bytes(data) if data[:2] == b"PK" else load_array(data, "t.npy")
