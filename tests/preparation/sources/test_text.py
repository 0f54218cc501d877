"""Compressed text and parquet: the same documents as of plain files, each file decompressed once."""

import gzip
import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmoe.errors import DataError
from mmoe.preparation.sources import ranges
from mmoe.preparation.sources.ranges import Forward
from tests.preparation.sources.test_sources import read, texts

LINES = [f"Zeile {i}: 吾輩は猫である。\r\n" * (1 + i % 3) for i in range(200)]


def zstd(data):
    return pa.Codec("zstd").compress(data).to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("frames", [1, 3])  # bgzip and pzstd write many
def test_compressed_files_give_the_documents_of_plain_ones(tmp_path, suffix, frames):
    book = "".join(LINES).encode()
    rows = "".join(json.dumps({"text": line}) + ("\r\n\n" if i % 7 else "\n") for i, line in enumerate(LINES)).encode()
    for name, data in (("book.txt", book), ("rows.jsonl", rows)):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(data)
        borders = [len(data) * i // frames for i in range(frames + 1)]
        packed = b"".join(COMPRESS[suffix](data[a:b]) for a, b in itertools.pairwise(borders))
        (tmp_path / "packed" / f"{name}{suffix}").write_bytes(packed)
    plain, _ = read("text", tmp_path / "plain", max_bytes=300)
    packed, refused = read("text", tmp_path / "packed", max_bytes=300)
    assert not refused and list(packed) == list(plain)
    assert [s.members for s in packed.values()] == [s.members for s in plain.values()]
    assert {s.recording for s in packed.values()} == {f"book.txt{suffix}", f"rows.jsonl{suffix}"}
    assert [texts(s)[0] for key, s in packed.items() if key.startswith("rows")] == LINES


def test_a_compressed_file_is_decompressed_once_for_the_list_and_once_for_the_samples(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(b"".join(b'{"text": "row %d"}\n' % i for i in range(500))))
    opened = []
    monkeypatch.setattr(
        ranges, "open_stream", lambda file, original=ranges.open_stream: opened.append(file) or original(file)
    )
    ranges.forward.cache_clear()
    samples, _ = read("text", tmp_path)
    assert [texts(s) for s in samples.values()] == [[f"row {i}"] for i in range(500)] and len(opened) == 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 500)), max_size=12))
def test_ranges_may_be_asked_for_in_any_order(tmp_path, ranges):
    data = random.Random(0).randbytes(4500)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(data))
    forward = Forward(tmp_path / "x.txt.gz")
    for start, length in ranges:
        assert forward.read(start, start + length) == data[start : start + length]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_or_wrong_file_is_refused_after_what_it_gives(tmp_path, suffix):
    rng = random.Random(1)
    data = b"".join(b'{"text": "%d %s"}\n' % (i, rng.randbytes(40).hex().encode()) for i in range(30_000))
    whole = COMPRESS[suffix](data)
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / f"book.txt{suffix}").write_bytes(b"not compressed")
    samples, refused = read("text", tmp_path)
    assert 0 < len(samples) < 30_000 and all(key.startswith("rows-") for key in samples)
    assert {key: r.reason for key, r in refused.items()} == {"rows": "unreadable file", "book": "unreadable file"}
    assert f"cannot be read after document {len(samples) - 1} (" in str(refused["rows"])


def test_a_parquet_column_is_read_by_row_groups(tmp_path, monkeypatch):
    rows = [f"Absatz {i} 語" for i in range(50)]
    rows[7], rows[31] = None, " "
    kinds = {"plain": pa.string(), "large": pa.large_string(), "coded": pa.dictionary(pa.int32(), pa.string())}
    for name, kind in kinds.items():
        table = pa.table({"id": range(50), "content": pa.array(rows).cast(kind)})
        pq.write_table(table, tmp_path / f"{name}.v1.parquet", row_group_size=20, compression="zstd")
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **k: reads.append(group) or original(self, group, **k)
    )
    samples, refused = read("text", tmp_path, columns={"text": "content"})
    for name in kinds:
        mine = [s for key, s in samples.items() if s.recording == f"{name}.v1.parquet"]
        assert [texts(s)[0] for s in mine] == [row for row in rows if row and row.strip()]
        assert {refused[f"{name}_v1-{i:06d}"].reason for i in (7, 31)} == {"empty text"}
    assert reads == [0, 1, 2] * 3
    with pytest.raises(DataError, match=r"has no column 'text'. Set the option columns.text to one of id, content"):
        read("text", tmp_path)
    with pytest.raises(DataError, match=r"has no column 'contents'; did you mean content\? Set the option"):
        read("text", tmp_path, columns={"text": "contents"})
    (tmp_path / "other.jsonl").write_text('{"id": "of another table"}')
    samples, refused = read("text", tmp_path, columns={"text": "id"})
    assert list(samples) == ["other-000000"] and {r.reason for r in refused.values()} == {"no such column"}
    assert "holds int64, not text" in str(refused["plain_v1"])


def test_a_broken_parquet_file_is_refused_alone(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "good.txt").write_bytes(b"good")
    samples, refused = read("text", tmp_path)
    assert set(samples) == {"good-000000"} and refused["bad"].reason == "unreadable file"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["tinyshakespeare", "wagahaiwa_nekodearu.ja"])
def test_books_are_the_same_compressed(tmp_path, shared_data, name):
    data = (shared_data / f"text/{name}.txt").read_bytes()
    (tmp_path / f"{name}.txt.zst").write_bytes(zstd(data))
    plain, _ = read("text", shared_data / f"text/{name}.txt")
    packed, refused = read("text", tmp_path)
    assert not refused and b"".join(s.members["txt"] for s in packed.values()) == data
    assert {k: s.members for k, s in packed.items()} == {k: s.members for k, s in plain.items()}
