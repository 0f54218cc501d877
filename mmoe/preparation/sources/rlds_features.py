"""Reads what describes a data set of tensorflow-datasets: `dataset_info.json` and `features.json`.

`dataset_info.json` names the splits, the number of examples in each of their files (`shardLengths`) and how the files
are called. `features.json` is a tree of features, each node of one kind (`featuresDict`, `sequence`, `tensor`, `image`,
`text`, `classLabel`, ...). In an example a feature's values stand in one list, under the names on the way to it joined
by ``/``. A sequence inside of a sequence is ragged: the list is ``<key>/ragged_flat_values``, and the lengths of its
rows are ``<key>/ragged_row_lengths_<depth>``.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.data.load.reading import reading
from mmoe.errors import DataError, brief
from mmoe.preparation.sources import jsonl

STEPS = "steps"
_NUMBERS = ("float", "int", "uint", "bool")


@dataclass(frozen=True)
class Feature:
    """Describes a feature of a step: what is stored for it, and in which shape.

    `rows` are the lengths of the sequences that it stands in below the step, outermost first; None where they vary.
    """

    name: str  # inside of a step, as observation/image_0
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str = "none"
    rows: tuple[int | None, ...] = ()

    @property
    def key(self) -> str:
        """Give the key of its values in an example."""
        return f"{STEPS}/{self.name}" + ("/ragged_flat_values" if self.rows else "")

    def row_lengths(self, depth: int) -> str:
        """Give the key of the lengths of its sequences, the outermost at depth 0."""
        return f"{STEPS}/{self.name}/ragged_row_lengths_{depth}"

    @property
    def size(self) -> int | None:
        """Count its values of one step; None where that varies."""
        sides = (*self.rows, *self.shape)
        return None if None in sides else math.prod(side for side in sides if side is not None)

    @property
    def is_image(self) -> bool:
        """Say whether it is one image a step."""
        return self.kind == "image" and not self.rows

    @property
    def is_text(self) -> bool:
        """Say whether it is one text a step."""
        return self.dtype in ("string", "object") and not self.rows and not self.shape

    @property
    def is_vector(self) -> bool:
        """Say whether it is a fixed number of numbers a step."""
        return self.dtype.startswith(_NUMBERS) and self.kind != "image" and self.encoding == "none" and bool(self.size)


@dataclass(frozen=True)
class TfdsSplit:
    """Names the files of a split, and how many episodes each of them has."""

    name: str
    files: tuple[tuple[Path, int], ...]

    @property
    def episodes(self) -> int:
        """Count the episodes of all files."""
        return sum(length for _, length in self.files)


def read_splits(root: Path) -> dict[str, TfdsSplit]:
    """Read the splits of the data set in the folder `root`, by name; raise DataError where its description is none."""
    file = root / "dataset_info.json"
    if not file.is_file() and (inner := sorted(root.rglob("dataset_info.json"))):
        raise DataError(f"{root} is no version of a data set; give the folder of one, as {inner[-1].parent}")
    info = jsonl.load_json(file, "give the folder of a version of a data set, as bridge_dataset/1.0.0")
    with reading("description of a data set of tensorflow-datasets", str(file), "restore it"):
        form = info.get("fileFormat") or "tfrecord"
        if form != "tfrecord":
            raise DataError(f"{file}: the files are {brief(form)}; only tfrecord is read: convert it with tfds")
        return {split["name"]: _split(root, info["name"], split) for split in info["splits"]}


def _split(root: Path, data_set: str, split: dict[str, Any]) -> TfdsSplit:
    if not isinstance(split["name"], str):
        raise ValueError(f"a split is called {brief(split['name'])}")
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    digits = max(5, len(str(len(lengths))))
    files = []
    for number, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"shardLengths has {length}")
        index, count = f"{number:0{digits}d}", f"{len(lengths):0{digits}d}"
        parts = {"DATASET": data_set, "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_INDEX": index}
        parts |= {"NUM_SHARDS": count, "SHARD_X_OF_Y": f"{index}-of-{count}"}
        files.append((root / template.format(**parts), length))
    return TfdsSplit(split["name"], tuple(files))


def read_step_features(root: Path) -> tuple[dict[str, Feature], frozenset[str]]:
    """Read the features of a step, by name, and the names of those of a whole episode."""
    file = root / "features.json"
    tree = jsonl.load_json(file, "restore it: it says what the examples hold")
    with reading("description of features", str(file), "restore it"):
        top = tree["featuresDict"]["features"]
        if STEPS not in top or "sequence" not in top[STEPS]:
            raise DataError(
                f"{file} has no sequence {STEPS!r}, so these are no episodes of RLDS; it has {', '.join(top)}"
            )
        steps = {feature.name: feature for feature in _leaves(top[STEPS]["sequence"]["feature"], "", ())}
        others = {STEPS: None, **top}
        del others[STEPS]
        episode = {"featuresDict": {"features": others}}
        return steps, frozenset(feature.name for feature in _leaves(episode, "", ()))


def _leaves(node: dict[str, Any], name: str, rows: tuple[int | None, ...]) -> list[Feature]:
    if "featuresDict" in node:
        inner = node["featuresDict"].get("features", {})
        return [leaf for key, child in inner.items() for leaf in _leaves(child, f"{name}/{key}".lstrip("/"), rows)]
    if "sequence" in node:
        length = int(node["sequence"].get("length", -1))
        return _leaves(node["sequence"]["feature"], name, (*rows, None if length < 0 else length))
    kinds = [key for key, value in node.items() if isinstance(value, dict)]
    if len(kinds) != 1:
        raise ValueError(f"feature {name!r} is of no kind: it has {', '.join(node)}")
    (kind,) = kinds
    said = node[kind]
    sides = [int(side) for side in said.get("shape", {}).get("dimensions", [])]
    shape = tuple(None if side < 0 else side for side in sides)
    dtype = {"text": "string", "classLabel": "int64"}.get(kind) or said.get("dtype", "")
    if not isinstance(dtype, str):
        raise ValueError(f"feature {name!r} has the dtype {brief(dtype)}")
    return [Feature(name, kind, dtype, shape, said.get("encoding", "none").lower(), rows)]
