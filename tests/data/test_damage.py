"""Damaged shards and indices: nothing is used that is not what was written, and every fault is one sentence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe.data.index.file import write_table
from mmoe.data.index.shard_index import INDEX_SCHEMA, Member, SegmentTable, ShardIndex
from mmoe.data.index.shards import ShardWriter, read_member, read_stored
from mmoe.errors import DataError
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.schema.sample import SEGMENT_DTYPE
from tests.data.synthetic import MAKERS, write_source

PARTS = ("segments", "segment_offsets")
WHOLE = (*PARTS, "member_ranges", "member_crc32", "member_decord", "member_offsets", "text_ids", "text_offsets")


def a_shard(root):
    arrays = {"text_ids": np.arange(9, dtype=np.int32), "segments": np.zeros(2, SEGMENT_DTYPE)}
    with ShardWriter(root / "train") as writer:
        for number in range(20):
            content = {"bin": bytes([number]) * 900, "txt": b"ab" * number}
            writer.write(f"k{number}", content, recording="r", content_hash=0, **arrays)
    return root / "train" / "shard-000000.tar"


def test_any_flipped_bit_of_a_member_is_noticed_whoever_reads_it(tmp_path):
    tar = a_shard(tmp_path)
    index, whole = ShardIndex.read(tar), tar.read_bytes()
    name, offset, size, crc32 = index.member(3, 0)
    assert read_stored(index, 3, 0).content == bytes([3]) * 900
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(0, size, 60), rng.integers(0, 8, 60)):
        damaged = bytearray(whole)
        damaged[offset + at] ^= 1 << bit
        tar.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{tar}: k3.bin .*checksum differs; copy the tar again or prepare"):
            read_stored(index, 3, 0)
        with pytest.raises(DataError, match="checksum differs"):
            read_member(tar, offset, size, name, crc32=crc32)
        assert read_stored(index, 4, 0).content == bytes([4]) * 900


def test_an_index_is_a_plain_parquet_file_to_everybody_else(tmp_path):
    tar = a_shard(tmp_path)
    table = pq.read_table(tar.with_suffix(".parquet"))
    assert table.schema.equals(INDEX_SCHEMA) and table["key"].to_pylist() == ShardIndex.read(tar).keys


@pytest.mark.parametrize("one_request", [0, 1 << 20])
def test_any_damaged_byte_of_an_index_is_a_sentence_or_changes_nothing(tmp_path, monkeypatch, one_request):
    """Every byte of a small index once, and cuts: read by columns a damaged column that is not asked for is not met."""
    monkeypatch.setattr("mmoe.data.index.file.ONE_REQUEST", one_request)
    tar = a_shard(tmp_path)
    path = tar.with_suffix(".parquet")
    whole, index, table = path.read_bytes(), ShardIndex.read(tar), SegmentTable.read(tar)
    rng, noticed = np.random.default_rng(0), 0
    damages = [(at, None) for at in range(0, len(whole), 3 if one_request else 7)]
    damages += [(0, whole[: int(at)]) for at in rng.integers(0, len(whole), 20)]
    for at, content in damages:
        if content is None:
            content = bytearray(whole)
            content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        for reader, expected, names in ((ShardIndex, index, WHOLE), (SegmentTable, table, PARTS)):
            try:
                found = reader.read(tar)
            except DataError as error:
                assert str(path) in str(error) and "prepare the source again" in str(error)
                noticed += 1
                continue
            assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in names)
    assert noticed > len(damages)


def an_index(tmp_path, change):
    """An index with good checksums of what `change` makes of the columns."""
    columns = {
        "key": ["a", "b"],
        "recording": ["r", "r"],
        "content_hash": [0, 0],
        "members": [[{"name": "bin", "offset": 512, "size": 10, "crc32": 0, "decord": False}] for _ in range(2)],
        "text_ids": [[1, 2], [3]],
        "segments": [[dict.fromkeys(SEGMENT_DTYPE.names, 0) | {"modality": int(Modality.STATE)}] for _ in range(2)],
    }
    change(columns)
    write_table(pa.table(columns, schema=INDEX_SCHEMA), tmp_path / "s.parquet")
    return tmp_path / "s.tar"


def segment(**fields):
    return lambda columns: columns["segments"][1][0].update(fields)


def member(**fields):
    return lambda columns: columns["members"][1][0].update(fields)


@pytest.mark.parametrize(
    "change, said",
    [
        (segment(modality=7), "modality of a segment lies outside 0 to 6"),
        (segment(start=3, stop=2), "stops before it starts"),
        (segment(start=-1), "start of a segment"),
        (segment(stop=1 << 60), "stop of a segment"),
        (segment(camera=127), "camera of a segment lies outside -1 to 126"),
        (segment(member=1), "names a member that its row has not"),
        (segment(member=-1), "names a member that its row has not"),
        (segment(modality=2, height=1 << 30, width=4), "height of a segment"),
        (segment(modality=2, height=4, width=4, stop=1 << 30), "frames"),
        (segment(modality=3), "an audio clip no rate"),
        (segment(start=None), "segments has nulls"),
        (member(offset=0), "a member lies outside the tar"),
        (member(size=-1), "a member lies outside the tar"),
        (member(size=1 << 60), "a member lies outside the tar"),
        (member(crc32=None), "members has nulls"),
        (lambda columns: columns["key"].__setitem__(0, None), "key has nulls"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(tmp_path, change, said):
    an_index(tmp_path, lambda columns: None)
    ShardIndex.read(tmp_path / "s.tar")
    with pytest.raises(DataError, match=f"s.parquet .*{said}.*prepare the source again"):
        ShardIndex.read(an_index(tmp_path, change))


def test_an_index_of_a_version_without_checksums_is_refused(tmp_path):
    tar = an_index(tmp_path, lambda columns: None)
    pq.write_table(pq.read_table(tmp_path / "s.parquet"), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="s.parquet cannot be read .*last bytes"):
        SegmentTable.read(tar)


def test_a_size_that_no_file_has_asks_for_no_memory(tmp_path):
    tar = a_shard(tmp_path)
    with pytest.raises(DataError, match="is truncated"):
        read_member(tar, *Member("k0.bin", 512, 1 << 49, 0)[1:3])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.update(format=2), "has format 2, this version reads"),
        (lambda m: m.update(format="x"), "format: Input should be"),
        (lambda m: m.pop("clock"), "clock: Field required"),
        (lambda m: m["splits"]["train"].update(samples=10**30), "splits.train.samples: "),
        (lambda m: m["splits"]["train"]["shards"][0].update(rows=10**12), "splits.train.shards.0.rows: "),
        (lambda m: m["splits"]["train"]["shards"][0].update(rows=-1), "splits.train.shards.0.rows: "),
        (lambda m: m["splits"].update(train=[]), "splits.train: "),
    ],
)
def test_a_manifest_of_another_shape_is_a_sentence(tmp_path, change, said):
    write_source(tmp_path / "s", {"train": [MAKERS["text"](np.random.default_rng(0), "a")]})
    path = tmp_path / "s" / "source.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{path} .*{said}.*prepare"):
        SourceManifest.load(tmp_path / "s")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}"])
def test_a_manifest_of_no_shape_is_a_sentence(tmp_path, content):
    (tmp_path / "source.json").write_bytes(content)
    with pytest.raises(DataError, match="source.json .*prepare"):
        SourceManifest.load(tmp_path)
