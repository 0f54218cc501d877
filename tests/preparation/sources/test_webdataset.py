"""WebDataset tars of images and captions: the same samples as the webdataset library, and what it would get wrong."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from mmoe.errors import DataError
from mmoe.preparation.sources import SOURCES, files
from tests.data.recordings import images
from tests.data.recordings_webdataset import write_tar
from tests.preparation.sources.test_sources import read, texts


def image(number, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(images(number % 5 + 1)[-1] ^ np.uint8(number)).save(buffer, format)
    return buffer.getvalue()


def sample(key, number, suffix="png", text="txt"):
    words = f"Bild {number}\n".encode()
    if text == "json":
        words = json.dumps({"caption": f"Bild {number}", "width": 64}).encode()
    return [(f"{key}.{suffix}", image(number, {"jpg": "JPEG"}.get(suffix, suffix))), (f"{key}.{text}", words)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_those_of_the_webdataset_library(tmp_path, format):
    members = [
        *sample("000000", 0),
        *sample("000001", 1, "jpg"),
        ("000001.cls", b"3"),
        *sample("sub.dir/000002", 2, "WEBP", "TXT"),
        *sample("000003", 3, "jpeg"),
        *sample("日本" if format != tarfile.USTAR_FORMAT else "x", 4),
    ]
    if format != tarfile.USTAR_FORMAT:
        members += sample("n" * 150, 5)  # a long name stands in a header of its own
    write_tar(tmp_path / "a.tar", members, format)
    ours, refused = read("webdataset", tmp_path / "a.tar")
    theirs = list(webdataset.WebDataset(f"file:{tmp_path / 'a.tar'}", shardshuffle=False, empty_check=False))
    assert not refused and len(ours) == len(theirs) == len(members) // 2
    for (key, mine), other in zip(ours.items(), theirs, strict=True):
        assert key == f"a/{other['__key__'].replace('.', '_')}"
        (suffix,) = {"jpg", "png", "webp", "jpeg"} & set(other)
        assert mine.members == {f"image.{suffix}": other[suffix], "txt": other["txt"]}
        seen, words = mine.segments
        assert (seen.height, seen.width, seen.pair, seen.slice) == (48, 64, 0, -1)
        assert (words.text.encode(), words.pair) == (other["txt"], 0)


def test_captions_may_stand_in_json(tmp_path):
    members = [
        *sample("a", 1, text="json"),
        *sample("b", 2),
        ("b.json", b'{"caption": "not this"}'),
        *sample("c", 3)[:1],
        ("c.json", b'{"title": "c"}'),
        *sample("d", 4)[:1],
        ("d.json", b"{"),
        *sample("e", 5)[:1],
        ("e.txt", b" \n"),
    ]
    write_tar(tmp_path / "x.tar", members)
    samples, refused = read("webdataset", tmp_path)
    assert {key: texts(s) for key, s in samples.items()} == {"x/a": ["Bild 1"], "x/b": ["Bild 2\n"]}
    assert {key: r.reason for key, r in refused.items()} == {
        "x/c": "malformed row",
        "x/d": "malformed row",
        "x/e": "empty text",
    }
    assert texts(read("webdataset", tmp_path, columns={"caption": "title"})[0]["x/c"]) == ["c"]


def test_shards_with_equal_numbering_do_not_collide(tmp_path):
    for number, name in enumerate(("s-0.tar", "s-1.tar", "more/s.2.tar")):
        write_tar(tmp_path / name, sample("000", number))
    samples, refused = read("webdataset", tmp_path)
    assert not refused and set(samples) == {"s-0/000", "s-1/000", "more/s_2/000"}
    assert {texts(s)[0] for s in samples.values()} == {"Bild 0\n", "Bild 1\n", "Bild 2\n"}
    assert all(s.recording == key for key, s in samples.items())
    assert set(read("webdataset", tmp_path, tars="s-[1-9].tar")[0]) == {"s-1/000"}


def test_a_dot_in_the_key_merges_samples_and_is_reported(tmp_path):
    members = [*sample("clip_1.5s", 1), *sample("clip_1.7s", 2), *sample("good", 3), *sample("v2.final", 4)]
    write_tar(tmp_path / "x.tar", members)
    (merged, *_) = webdataset.WebDataset(f"file:{tmp_path / 'x.tar'}", shardshuffle=False, empty_check=False)
    assert {"5s.png", "7s.png"} <= set(merged)  # what the library makes of it
    samples, refused = read("webdataset", tmp_path)
    assert set(samples) == {"x/good", "x/v2"}  # one dotted name merges nothing
    assert refused["x/clip_1"].reason == "samples merged by a dot in the key"
    assert "x.tar: key clip_1 has several images or texts (5s.png, 5s.txt, 7s.png" in str(refused["x/clip_1"])


@pytest.mark.parametrize(
    "order, reason",
    [
        ("a.png b.png a.txt b.txt", {"x/a": "sample torn apart in the tar", "x/b": "sample torn apart in the tar"}),
        ("a.png a.txt b.png b.txt a.png a.txt", {"x/a": "duplicate key"}),
        ("a.png a.txt a.png b.png b.txt", {"x/a": "duplicate key"}),
        ("a.png b.png b.txt", {"x/a": "sample without text"}),
        ("a.txt a.mp4 b.png b.txt", {"x/a": "sample without image"}),
        ("README b.png b.txt __meta__/x.txt dir/.hidden", {"x/README": None, "x/dir/.hidden": None}),
    ],
)
def test_what_makes_no_sample_is_refused_alone(tmp_path, order, reason):
    members = [(name, image(ord(name[0])) if name.endswith("png") else b"words") for name in order.split()]
    write_tar(tmp_path / "x.tar", members)
    samples, refused = read("webdataset", tmp_path)
    assert {k: r.reason for k, r in refused.items()} == {
        k: r or "member without key and field" for k, r in reason.items()
    }
    assert set(samples) == {"x/b"} - set(reason)


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    write_tar(tmp_path / "x.tar", [m for i in range(4) for m in sample(f"k{i}", i)])
    with tarfile.open(tmp_path / "x.tar") as tar:
        at = tar.getmember("k2.png").offset_data
    whole = (tmp_path / "x.tar").read_bytes()
    for stop in (at + 20, at - 100, at - 512):  # in an image, in a header, before it
        (tmp_path / "x.tar").write_bytes(whole[:stop])
        samples, refused = read("webdataset", tmp_path)
        assert {"x/k0"} <= set(samples) <= {"x/k0", "x/k1"}
        assert refused["x"].reason == "unreadable tar" and "copy it again" in str(refused["x"])
    (tmp_path / "x.tar").write_bytes(gzip.compress(whole))
    samples, refused = read("webdataset", tmp_path)
    assert not samples and "unpack it where it is compressed" in str(refused["x"])


def test_a_folder_without_tars_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no file \*\*/\*\.tar; give a tar"):
        read("webdataset", tmp_path)


def test_listing_reads_no_content_and_making_reads_its_ranges_alone(tmp_path, monkeypatch):
    write_tar(tmp_path / "x.tar", [(n, c + bytes(1 << 20)) for i in range(8) for n, c in sample(f"k{i}", i)])
    read_bytes = 0
    plain = io.FileIO

    class Counting(plain):
        def readinto(self, buffer):
            nonlocal read_bytes
            count = super().readinto(buffer)
            read_bytes += count
            return count

    monkeypatch.setattr(files, "open_regular", lambda path: io.BufferedReader(Counting(path)))
    source = SOURCES.find("webdataset")
    items = list(source.items(tmp_path, source.config(), lambda *refusal: pytest.fail(str(refusal))))
    assert len(items) == 8 and 16 * 512 <= read_bytes < 2 << 20  # of 16 MiB
