"""Episodes of RLDS as tensorflow-datasets lays them out: records, examples and descriptions, from their definitions.

Nothing here is shared with the reader: the checksum is bit by bit, protobuf is put together by hand.
"""

import json
import struct
from pathlib import Path

import numpy as np

from tests.data.recordings_robot import jpeg, level_images


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8 & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values, packed: bool = True) -> bytes:
    """A `Feature`: of bytes where the first value is, of f32 where it is a float, else of i64."""
    values = list(values)
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if isinstance(values[0], float):
        coded, number, wire = [struct.pack("<f", value) for value in values], 2, 5
    else:
        coded, number, wire = [varint(value) for value in values], 3, 0
    if packed:
        return field(number, field(1, b"".join(coded)))
    return field(number, b"".join(varint(1 << 3 | wire) + value for value in coded))


def example(lists: dict, packed: bool = True) -> bytes:
    entries = (field(1, field(1, key.encode()) + field(2, feature(values, packed))) for key, values in lists.items())
    return field(1, b"".join(entries))


CLASSES = "tensorflow_datasets.core.features"


def tensor(*shape: int, dtype: str = "float32", encoding: str = "none") -> dict:
    sides = {"dimensions": [str(side) for side in shape]} if shape else {}
    return {
        "pythonClassName": f"{CLASSES}.tensor_feature.Tensor",
        "tensor": {"shape": sides, "dtype": dtype, "encoding": encoding},
        "description": "given",
    }


def image() -> dict:
    said = {"shape": {"dimensions": ["32", "64", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}
    return {"pythonClassName": f"{CLASSES}.image_feature.Image", "image": said}


def text() -> dict:
    return {"pythonClassName": f"{CLASSES}.text_feature.Text", "text": {}}


def tree(**features: dict) -> dict:
    return {"pythonClassName": f"{CLASSES}.features_dict.FeaturesDict", "featuresDict": {"features": features}}


def sequence(inner: dict, length: int = -1, kind: str = "sequence_feature.Sequence") -> dict:
    return {"pythonClassName": f"{CLASSES}.{kind}", "sequence": {"feature": inner, "length": str(length)}}


def step_features(cameras: tuple[str, ...] = ("image_0",), **further: dict) -> dict:
    observation = tree(**{camera: image() for camera in cameras}, state=tensor(3))
    flags = {name: tensor(dtype="bool") for name in ("is_first", "is_last", "is_terminal")}
    return dict(observation=observation, action=tensor(3), language_instruction=text(), **flags, **further)


def episode(number: int, steps: int, cameras: tuple[str, ...] = ("image_0",), **further) -> dict:
    """Episode e's step i has state (e, i, 0.5), action (e, i + 1, 0.25), image number e * 8 + i."""
    shown = level_images(number * 8, steps)
    lists = {
        f"steps/observation/{camera}": [jpeg(each + np.uint8(2 * c)) for each in shown]
        for c, camera in enumerate(cameras)
    }
    lists["steps/observation/state"] = [v for i in range(steps) for v in (float(number), float(i), 0.5)]
    lists["steps/action"] = [v for i in range(steps) for v in (float(number), i + 1.0, 0.25)]
    lists["steps/language_instruction"] = [f"task {number}".encode()] * steps
    lists["steps/is_first"] = [int(i == 0) for i in range(steps)]
    lists["steps/is_last"] = lists["steps/is_terminal"] = [int(i == steps - 1) for i in range(steps)]
    return lists | {"episode_metadata/file_path": [b"raw/out.npy"]} | further


def write_rlds(
    folder: Path,
    splits: dict[str, list[list[dict]]],
    *,
    name: str = "arm",
    steps: dict | None = None,
    metadata: dict | None = None,
    packed: bool = True,
) -> None:
    """Write a version of a data set; a split is a list of files, each a list of episodes as `episode` makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for split, files in splits.items():
        for number, episodes in enumerate(files):
            data = b"".join(record(example(lists, packed)) for lists in episodes)
            (folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(files):05d}").write_bytes(data)
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "0",
                "shardLengths": [str(len(episodes)) for episodes in files],
            }
        )
    info = {"fileFormat": "tfrecord", "name": name, "splits": described, "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    step = tree(**(steps or step_features()))
    top = tree(
        episode_metadata=tree(file_path=text(), **(metadata or {})),
        steps=sequence(step, kind="dataset_feature.Dataset"),
    )
    (folder / "features.json").write_text(json.dumps(top))
