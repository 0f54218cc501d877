"""`source.json` that is damaged, or was written by somebody else: a sentence that names the file and the key."""

import json

import pytest

from mmoe.errors import DataError
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.rig import STANDARD

SPLIT = {
    "samples": 1,
    "recordings": 1,
    "shards": [{"path": "train/a.tar", "rows": 1, "bytes": 9, "digest": "ab"}],
    "clips": 0,
    "slices": 0,
}
STATS = {"names": ["a", "b"], "mean": [0.0, 0.0], "std": [1.0, 1.0], "q01": [0.0, 0.0], "q99": [1.0, 1.0]}
MANIFEST = {
    "format": 3,
    "kind": "text",
    "text_fingerprint": "x",
    "clock": "none",
    "skew_budget_ns": 0,
    "vectors": {"STATE": STATS},
    "splits": {"train": SPLIT | {"groups": []}, "heldout": SPLIT | {"groups": []}},
    "quarantined": {},
}


def changed(path: str, value: object = None) -> bytes:
    """The manifest with a value at a path of keys, or (None) without the last of them."""
    tree = node = json.loads(json.dumps(MANIFEST))
    *keys, last = path.split("/")
    for key in keys:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return json.dumps(tree).encode()


def test_the_manifest_that_the_others_are_made_of_is_read(tmp_path):
    (tmp_path / "source.json").write_text(json.dumps(MANIFEST))
    found = SourceManifest.load(tmp_path)
    assert found.splits["heldout"].samples == 1
    assert found.rig == STANDARD  # which it does not name


@pytest.mark.parametrize(
    "content, sentence",
    [
        *((changed(key), f"{key}: Field required") for key in MANIFEST if key != "splits"),
        (changed("splits"), "splits: Field required"),
        (changed("splits/train"), "splits: it has 'heldout', where train and perhaps heldout belong"),
        (changed("splits/extra", SPLIT | {"groups": []}), "splits: it has 'train, heldout, extra'"),
        (changed("splits/train/shards"), "splits.train.shards: Field required"),
        (changed("splits/train/samples", -1), "splits.train.samples: Input should be greater than or equal to 0"),
        (changed("splits/train/samples", 10**400), "splits.train.samples: Input should be"),
        (changed("splits/train/samples", "1"), "splits.train.samples: Input should be a valid integer"),
        (changed("splits/train/shards/0/path", "../../a.tar"), "shards.0.path: '../../a.tar' is no path inside"),
        (changed("splits/train/shards/0/path", "/etc/passwd"), "shards.0.path: '/etc/passwd' is no path inside"),
        (changed("vectors/STATE/std", [1.0]), "vectors.STATE: std has 1 values for 2 dimensions"),
        (changed("vectors/STATE/mean", [0.0, float("inf")]), "vectors.STATE.mean.1: Input should be a finite number"),
        (changed("vectors", []), "vectors: Input should be an object"),
        (changed("rig", {"cameras": ["top", "top"]}), "rig.cameras: two cameras are named 'top'"),
        (b"", "all of it: Invalid JSON"),
        (b"[]", "all of it: Input should be an object"),
        (b"\xff\xfe{", "all of it: Invalid JSON"),
        (b"[" * 100_000, "all of it: Invalid JSON: recursion limit"),
        (b'{"format": ' + b"9" * 5000, "Invalid JSON|format: "),
    ],
)
def test_a_manifest_without_its_fields_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "source.json").write_bytes(content)
    with pytest.raises(
        DataError, match=f"source.json is not a source manifest .*{sentence}.*prepare the source again"
    ) as caught:
        SourceManifest.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
