"""Shards: WebDataset and tarfile read what we wrote, the index finds every byte, what they would lose is refused."""

import itertools
import tarfile
import threading
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmoe.data.index import file as index_file
from mmoe.data.index.shard_index import PLANNED, Member, SegmentTable, ShardIndex
from mmoe.data.index.shards import ShardWriter, check_key, read_member, spans
from mmoe.errors import DataError
from mmoe.schema.sample import SEGMENT_DTYPE

WORD = st.text(st.characters(codec="utf-8", exclude_characters="./", exclude_categories=("C", "Z")), min_size=1)
KEYS = st.lists(WORD, min_size=1, max_size=3).map("/".join).filter(lambda key: not key.startswith("__"))
FIELDS = st.lists(st.text("abcxyz019_", min_size=1, max_size=6), min_size=1, max_size=2).map(".".join)
FIELDS = FIELDS.filter(lambda field: not field.startswith("__"))
SAMPLES = st.dictionaries(KEYS, st.dictionaries(FIELDS, st.binary(max_size=1500), min_size=1, max_size=3), max_size=8)


def write(folder, samples, **limits):
    with ShardWriter(folder, **limits) as writer:
        for number, (key, members) in enumerate(samples.items()):
            segments = np.zeros(number % 3, SEGMENT_DTYPE)
            segments["timestamp_ns"] = -number
            ids = np.arange(number, dtype=np.int32)
            writer.write(key, members, recording=f"r{number}", content_hash=-number, text_ids=ids, segments=segments)
    return writer.shards


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(SAMPLES, st.integers(1, 6), st.integers(2000, 20_000))
def test_others_and_our_index_find_the_same_samples(tmp_path_factory, samples, max_rows, max_bytes):
    folder = tmp_path_factory.mktemp("shards") / "train"
    shards = write(folder, samples, max_rows=max_rows, max_bytes=max_bytes)
    tars = [folder.parent / shard.path for shard in shards]

    theirs = {}
    if tars:
        dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
        theirs = {sample.pop("__key__"): sample for sample in dataset}
    assert list(theirs) == list(samples)
    for key, members in samples.items():
        assert {name: data for name, data in theirs[key].items() if not name.startswith("__")} == members

    walked = [member.name for tar in tars for member in tarfile.open(tar).getmembers()]
    assert walked == [f"{key}.{field}" for key, members in samples.items() for field in members]

    number = 0
    for tar, shard in zip(tars, shards):
        index = ShardIndex.read(tar)
        assert len(index) == shard.rows <= max_rows and tar.stat().st_size == shard.bytes == index.tar_bytes
        index.check_tar()
        table = SegmentTable.read(tar)
        assert table.segment_offsets.tolist() == index.segment_offsets.tolist() and len(table) == len(index)
        assert all((table.segments[name] == index.segments[name]).all() for name in PLANNED)
        for row, key in enumerate(index.keys):
            ranges = [index.row_member(row, member) for member in range(len(samples[key]))]
            read = {name: read_member(tar, offset, size, f"{key}.{name}") for name, offset, size in ranges}
            assert read == samples[key]
            assert index.recordings[row] == f"r{number}" and len(index.row_text(row)) == number
            assert (index.row_segments(row)["timestamp_ns"] == -number).all()
            number += 1


def test_same_samples_give_the_same_bytes_and_shards_respect_their_size(tmp_path):
    samples = {f"k{i}": {"bin": bytes([i]) * 700} for i in range(40)}
    shards = write(tmp_path / "a" / "train", samples, max_bytes=8_000)
    write(tmp_path / "b" / "train", samples, max_bytes=8_000)
    assert len(shards) > 3 and all(shard.bytes <= 8_000 + tarfile.RECORDSIZE for shard in shards)
    for file in sorted((tmp_path / "a" / "train").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / "train" / file.name).read_bytes()


def test_a_digest_follows_from_all_that_the_samples_are_and_nothing_else(tmp_path):
    """Without opening a tar: a byte of a member changes its checksum in the index."""

    def digest(
        name, key="k", content=b"abc", recording="r", content_hash=1, text=(1, 2), decord=frozenset(), **segment
    ):
        rows = np.zeros(2, SEGMENT_DTYPE)
        for field, value in segment.items():
            rows[field] = value
        with ShardWriter(tmp_path / name) as writer:
            writer.write(
                key,
                {"bin": content},
                recording=recording,
                content_hash=content_hash,
                text_ids=np.array(text, np.int32),
                segments=rows,
                decord=decord,
            )
        return writer.shards[0].digest

    changes = [
        {"key": "l"},
        {"content": b"abd"},
        {"recording": "s"},
        {"content_hash": 2},
        {"text": (1, 3)},
        {"text": (1,)},
        {"decord": frozenset({"bin"})},
        *({field: 1} for field in SEGMENT_DTYPE.names),
    ]
    found = [digest(f"train{number}", **change) for number, change in enumerate(changes)]
    plain = digest("plain")
    assert digest("again") == plain and len({plain, *found}) == len(changes) + 1


def test_an_index_of_another_digest_is_named(tmp_path):
    first, second = write(tmp_path / "train", {f"k{i}": {"bin": bytes([i])} for i in range(2)}, max_rows=1)
    tar = tmp_path / first.path
    assert len(SegmentTable.read(tar, digest=first.digest)) == 1
    with pytest.raises(DataError, match="shard-000000.parquet is not the index that source.json names"):
        SegmentTable.read(tar, digest=second.digest)


def test_a_name_beyond_the_classic_header_is_found(tmp_path):
    key = "/".join(["a-rather-long-folder-name"] * 6)
    (shard,) = write(tmp_path / "train", {key: {"txt": b"here"}})
    index = ShardIndex.read(tmp_path / shard.path)
    _, offset, size = index.row_member(0, 0)
    assert read_member(index.tar, offset, size, f"{key}.txt") == b"here"
    with pytest.raises(DataError, match="no another-rather-long"):
        read_member(index.tar, offset, size, f"another-{key[2:]}.txt")
    assert [m.name for m in tarfile.open(index.tar).getmembers()] == [f"{key}.txt"]


@pytest.mark.parametrize(
    "key, said",
    [
        ("clip_1.5s", "merge with others as 'clip_1'"),
        ("set.v1/clip_1.5s", "merge with others as 'set.v1/clip_1'"),
        ("a/../b", "relative path"),
        ("./a", "relative path"),
        ("clip.", "merge with others as 'clip'"),
        ("a/.b", "merge with others as 'a/'"),
        ("a/.", "relative path"),
        ("a//b", "relative path"),
        ("/a", "relative path"),
        ("", "relative path"),
        ("__meta__", "two underscores"),
        ("a\nb", "relative path"),
    ],
)
def test_keys_that_webdataset_would_merge_or_skip_are_refused(tmp_path, key, said):
    with pytest.raises(DataError, match=said):
        check_key(key)
    with pytest.raises(DataError, match=said):
        write(tmp_path / "train", {key: {"txt": b""}})


def test_a_folder_may_have_dots_and_webdataset_finds_the_same_keys(tmp_path):
    keys = ["set.v1.0/a", "set.v1.0/b", ".hidden/..x/c"]
    (shard,) = write(tmp_path / "train", {key: {"bin": key.encode()} for key in keys})
    found = list(webdataset.WebDataset(str(tmp_path / shard.path), shardshuffle=False))
    assert [(sample["__key__"], sample["bin"].decode()) for sample in found] == [(key, key) for key in keys]
    assert list(ShardIndex.read(tmp_path / shard.path).keys) == keys


def test_two_keys_with_dots_would_indeed_have_been_merged(tmp_path):
    """What `check_key` guards against is real: the library makes one sample of two."""
    tar = tmp_path / "bad.tar"
    with tarfile.open(tar, "w") as file:
        for name in ("clip_1.5s.a", "clip_1.7s.b"):
            file.addfile(tarfile.TarInfo(name))
    assert len(list(webdataset.WebDataset(str(tar), shardshuffle=False))) == 1


@pytest.mark.parametrize("field", ["JPG", "a/b", ".jpg", "jpg.", "", "__key__", "__bad__"])
def test_member_names_that_would_change_are_refused(tmp_path, field):
    with pytest.raises(DataError, match="sample k"):
        write(tmp_path / "train", {"k": {field: b""}})


def test_repeated_key_and_sample_without_members_are_refused(tmp_path):
    arrays = {"text_ids": np.zeros(0, np.int32), "segments": np.zeros(0, SEGMENT_DTYPE)}
    with ShardWriter(tmp_path / "train") as writer:
        writer.write("k", {"txt": b"1"}, recording="r", content_hash=0, **arrays)
        with pytest.raises(DataError, match="k occurs twice"):
            writer.write("k", {"txt": b"2"}, recording="r", content_hash=0, **arrays)
        with pytest.raises(DataError, match="l has no member"):
            writer.write("l", {}, recording="r", content_hash=0, **arrays)
    assert [shard.rows for shard in writer.shards] == [1]


def test_a_shard_that_was_broken_off_is_not_seen(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "train", max_rows=2) as writer:
        for i in range(3):
            arrays = {"text_ids": np.zeros(0, np.int32), "segments": np.zeros(0, SEGMENT_DTYPE)}
            writer.write(f"k{i}", {"txt": b"1"}, recording="r", content_hash=0, **arrays)
        raise KeyboardInterrupt
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["shard-000000.parquet", "shard-000000.tar"]


def test_truncated_missing_and_exchanged_tars_are_named(tmp_path):
    (shard,) = write(tmp_path / "train", {"a": {"bin": bytes(3000)}, "b": {"bin": bytes(5000)}})
    tar = tmp_path / shard.path
    index = ShardIndex.read(tar)
    _, offset, size = index.row_member(1, 0)
    whole = tar.read_bytes()

    for length in (offset + size - 1, offset - 100, 0):
        tar.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{tar} is truncated: b.bin .*prepare the source again"):
            read_member(tar, offset, size, "b.bin")
    tar.write_bytes(whole[512:] + bytes(512))
    with pytest.raises(DataError, match="not the tar its index describes: there is no b.bin"):
        read_member(tar, offset, size, "b.bin")
    tar.unlink()
    with pytest.raises(DataError, match=rf"{tar} does not exist, so b.bin cannot be read"):
        read_member(tar, offset, size, "b.bin")


def test_an_index_of_another_tar_is_noticed_by_its_length_and_by_the_names(tmp_path):
    """Two tars whose members have the same sizes at the same places: only the names tell them apart."""
    write(tmp_path / "a", {"one": {"bin": bytes(700)}, "two": {"bin": bytes(700)}})
    write(tmp_path / "b", {"two": {"bin": bytes(700)}, "one": {"bin": bytes(700)}})
    write(tmp_path / "c", {"one": {"bin": bytes(70_000)}})
    tar, index = tmp_path / "a" / "shard-000000.tar", ShardIndex.read(tmp_path / "a" / "shard-000000.tar")
    tar.write_bytes((tmp_path / "b" / "shard-000000.tar").read_bytes())
    index.check_tar()
    with pytest.raises(DataError, match=f"{tar} is not the tar its index describes: there is no one.bin of 700 bytes"):
        read_member(tar, *index.row_member(0, 0)[1:], "one.bin")
    tar.write_bytes((tmp_path / "c" / "shard-000000.tar").read_bytes())
    with pytest.raises(
        DataError, match=f"{tar} is not the tar its index describes: it has 71680 bytes, that one 10240"
    ):
        index.check_tar()
    tar.write_bytes(b"")
    with pytest.raises(DataError, match=f"{tar} is truncated: it has 0 bytes"):
        index.check_tar()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.data())
def test_spans_hold_every_member_and_leave_out_every_wide_gap(sizes, data):
    tar, members = bytearray(), []
    for number, size in enumerate(sizes):
        header = tarfile.TarInfo(f"k.{number}")
        header.size = size
        tar += header.tobuf()
        members.append(Member(f"k.{number}", len(tar), size, zlib.crc32(bytes([number]) * size)))
        tar += bytes([number]) * size + bytes(-size % 512)
    chosen = data.draw(st.lists(st.sampled_from(members), unique=True, min_size=1))
    gap = data.draw(st.sampled_from([0, 512, 2048, 1 << 20]))
    found = spans(chosen, gap)
    cut = {}
    for span in found:
        content = bytes(tar[span.start : span.stop])
        cut |= {member.name: span.cut(content, "tar", member.name) for member in span.members}
    assert cut == {name: bytes(tar[offset : offset + size]) for name, offset, size, _ in chosen}
    assert all(b.start - a.stop >= gap for a, b in itertools.pairwise(found))
    inside = [(b[1] - 512) - (a[1] + a[2]) for s in found for a, b in zip(s.members, s.members[1:])]
    assert all(between < gap for between in inside)


def test_an_index_is_read_by_the_thread_that_asks_for_it(tmp_path, monkeypatch):
    """A thread of pyarrow's holds Python's locks at times of its own: a child forked at such a time hangs."""
    (shard,) = write(tmp_path / "train", {f"sample-{number}": {"bin": b"payload"} for number in range(9)})
    readers, read = set(), index_file._Ranges.read
    monkeypatch.setattr(index_file._Ranges, "read", lambda *given: readers.add(threading.get_ident()) or read(*given))
    SegmentTable.read(tmp_path / shard.path)
    ShardIndex.read(tmp_path / shard.path)
    assert readers == {threading.get_ident()}


def test_any_fsspec_url_can_be_read(tmp_path):
    import fsspec

    (shard,) = write(tmp_path / "train", {"a": {"bin": b"payload"}})
    _, offset, size = ShardIndex.read(tmp_path / shard.path).row_member(0, 0)
    fsspec.filesystem("memory").pipe("/bucket/s.tar", (tmp_path / shard.path).read_bytes())
    assert read_member("memory://bucket/s.tar", offset, size) == b"payload"
