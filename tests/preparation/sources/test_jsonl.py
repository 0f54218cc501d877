"""JSON that somebody else wrote: what it may hold, how deep and how long, and that one bad row costs one row."""

import json
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.errors import DataError, Refused
from mmoe.preparation.sources import jsonl
from mmoe.preparation.sources.files import check_name, listing, pass_over, read_bytes
from mmoe.schema.bounds import BEYOND, Bounds, bounded_by
from tests.data.recordings import images, png, write_captions, write_jsonl
from tests.data.recordings_audio import write_librispeech
from tests.data.recordings_webdataset import write_tar
from tests.preparation.sources.test_sources import read, texts

BAD = {
    "digits": ('{"text": "x", "n": ' + "7" * 5000 + "}", BEYOND),
    "fraction": ('{"text": "x", "n": 0.' + "7" * 5000 + "}", BEYOND),
    "depth": ('{"text": "x", "n": ' + "[" * 20_000 + "]" * 20_000 + "}", BEYOND),
    "deep": ('{"text": "x", "n": ' + "[" * 64 + "]" * 64 + "}", BEYOND),
    "cut": ('{"text": "x"', "malformed row"),
    "list": ("[1]", "malformed row"),
    "nothing": ('{"text": null}', "empty text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_alone_in_every_reader_of_rows(tmp_path, name):
    bad, reason = BAD[name]
    (tmp_path / "text").mkdir()
    good = json.dumps({"text": "good " + "8" * 5000, "n": [[1]] * 40})  # digits in a string are no number
    (tmp_path / "text/a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    samples, refused = read("text", tmp_path / "text")
    assert list(samples) == ["a-000000", "a-000002"] and [r.reason for r in refused.values()] == [reason]
    (tmp_path / "image").mkdir()
    write_captions(tmp_path / "image", 3)
    with (tmp_path / "image/captions.jsonl").open("a") as file:
        file.write(bad + "\n")
    samples, refused = read("image_caption", tmp_path / "image")
    assert len(samples) == 3 and {r.reason for r in refused.values()} <= {reason, "malformed row"}
    picture = png(images(1)[0])
    rows = [("a.png", picture), ("a.json", bad.encode()), ("b.png", picture), ("b.json", b'{"caption": "b"}')]
    write_tar(tmp_path / "web/x.tar", rows)
    samples, refused = read("webdataset", tmp_path / "web")
    assert list(samples) == ["x/b"] and refused["x/a"].reason in (reason, "malformed row")


def test_depth_and_digits_count_to_the_bound():
    with bounded_by(Bounds(json_depth=3, json_digits=4)):
        jsonl.parse("[[[1234, 12.4]]]", "x")
        for text in ("[[[[1]]]]", '{"a": [[{}]]}', "[12345]", "[0.12345]"):
            with pytest.raises(Refused, match="prepare.bounds.json_") as caught:
                jsonl.parse(text, "x")
            assert caught.value.reason == BEYOND
        assert jsonl.parse('["12345", "[[[[[[" ]', "x") == ["12345", "[[[[[["]


def test_a_line_takes_no_more_memory_than_a_row_may_have(tmp_path):
    rows = [b'{"text": "a"}', b'{"text": "' + b"b" * 1000 + b'"}', b'{"text": "c"}', b"d" * 1000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with bounded_by(Bounds(row_bytes=100)):
        with (tmp_path / "a.jsonl").open("rb") as stream:
            assert [(at, len(line)) for at, line in jsonl.lines(stream)] == [
                (0, 13),
                (14, 101),
                (1027, 13),
                (1041, 101),
            ]
        samples, refused = read("text", tmp_path)
    assert [texts(s) for s in samples.values()] == [["a"], ["c"]]
    assert {key: r.reason for key, r in refused.items()} == {"a-000001": BEYOND, "a-000003": BEYOND}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:0123456789.eE-NaInfity \\u', max_size=60).map(str.encode))
def test_any_bytes_are_a_row_or_refused(data):
    try:
        assert isinstance(jsonl.parse_row(data, "f", 0, "x"), dict)
    except Refused as refusal:
        assert str(refusal).startswith(("x", "f"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, 10**399])
def test_what_is_no_number_is_refused_where_a_number_is_needed(value):
    with pytest.raises(Refused, match=r"x: 'n' is .*, not a number"):
        jsonl.number_of({"n": value}, "n", "x")


def test_a_byte_order_mark_is_no_text_and_utf16_is_named(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"first. " * 30)
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "second"}\n')
    (tmp_path / "c.txt").write_bytes("third".encode("utf-16"))
    (tmp_path / "d.jsonl").write_bytes('{"text": "fourth"}'.encode("utf-16-le"))
    samples, refused = read("text", tmp_path, max_bytes=64)
    assert "".join(texts(s)[0] for key, s in samples.items() if key.startswith("a")) == "first. " * 30
    assert texts(samples["b-000000"]) == ["second"]
    assert set(refused) == {"c", "d"} and all("iconv -f UTF-16 -t UTF-8" in str(r) for r in refused.values())
    write_tar(tmp_path / "x.tar", [("a.png", png(images(1)[0])), ("a.txt", mark + b"caption")])
    assert texts(read("webdataset", tmp_path / "x.tar")[0]["x/a"]) == ["caption"]


LATIN = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_are_refused_and_the_rest_is_read(tmp_path):
    text, web, tree = (tmp_path / name for name in ("text", "web", "tree"))
    text.mkdir()
    for name in (LATIN, "good"):
        (text / f"{name}.txt").write_bytes(b"words")
    samples, refused = read("text", text)
    assert list(samples) == ["good-000000"] and [r.reason for r in refused.values()] == ["name is not UTF-8"]
    assert r"caf\udce9.txt" in str(*refused.values()) and "rename" in str(*refused.values())
    picture = png(images(1)[0])
    write_tar(web / "x.tar", [(f"{n}.{s}", d) for n in (LATIN, "b") for s, d in (("png", picture), ("txt", b"w"))], 1)
    write_tar(web / f"{LATIN}.tar", [("a.png", picture), ("a.txt", b"words")])
    samples, refused = read("webdataset", web)
    assert list(samples) == ["x/b"] and [r.reason for r in refused.values()] == ["name is not UTF-8"] * 2
    write_librispeech(tree, {19: (198,)})
    (tree / "19").rename(tree / LATIN)
    write_librispeech(tree, {84: (7,)})
    samples, refused = read("audio_text", tree)
    assert len(samples) == 2 and {r.reason for r in refused.values()} == {"name is not UTF-8"}
    with pytest.raises(Refused):
        check_name("\ud800", "x")


@pytest.mark.parametrize("name", ["\ud800.png", "a\0b.png", "x" * 300, ".", "pipe", "/dev/zero"])
def test_a_row_that_names_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")  # which would wait for a writer for ever

    def refused() -> None:
        with pytest.raises(Refused):
            read_bytes(tmp_path / name, "x")

    thread = threading.Thread(target=refused, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(Refused, match="named by line 1") as caught:
        read_bytes(tmp_path / name, "line 1")
    assert caught.value.reason == "missing file"


def test_a_file_beyond_the_bound_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(Refused, match="1,099,511,627,776, the bound file_bytes") as caught:
        read_bytes(tmp_path / "big", "x")
    assert caught.value.reason == BEYOND


def test_folders_are_listed_without_what_is_hidden_and_with_what_is_odd(tmp_path):
    for name in ("b.txt", "a/c.TXT", ".DS_Store", ".git/x.txt", "a/notes.doc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    refused = {}
    found = listing(tmp_path, lambda key, refusal: refused.update({key: refusal.reason}))
    names = [file.relative_to(tmp_path).as_posix() for file in found]
    assert names == ["a/c.TXT", "a/notes.doc", "b.txt", "link.txt"]
    assert refused == dict.fromkeys(("loop", "nowhere.txt", "pipe.txt"), "no regular file")
    pass_over(found[1:2], tmp_path, "texts", lambda key, refusal: refused.update({key: refusal.reason}))
    assert refused["a/notes.doc"] == "file of another kind"


def test_nothing_is_left_out_silently_in_any_reader_of_folders(tmp_path):
    """Upper case is read; what is of another kind, and what no line names, is counted."""
    text, image, audio, web = (tmp_path / name for name in ("text", "image", "audio clips", "web"))
    for folder in (text, image, web):
        folder.mkdir()
        (folder / "NOTES.doc").write_text("x")
    for name in ("A.TXT", "b.Txt"):
        (text / name).write_bytes(b"words")
    write_jsonl(text / "c.JSONL", [{"text": "more words"}])
    samples, refused = read("text", text)
    assert list(samples) == ["A-000000", "b-000000", "c-000000"]
    assert {k: r.reason for k, r in refused.items()} == {"NOTES.doc": "file of another kind"}
    write_captions(image, 2)
    (image / "extra.png").write_bytes(png(images(1)[0]))
    samples, refused = read("image_caption", image)
    assert len(samples) == 2
    assert {k: r.reason for k, r in refused.items()} == dict.fromkeys(
        ["NOTES.doc", "extra.png"], "file of another kind"
    )
    keys = list(write_librispeech(audio, {19: (198,)}))
    (audio / f"{keys[0]}.flac").rename(audio / f"{keys[0]}.FLAC")
    (audio / "loose.flac").write_bytes(b"")
    (audio / "SPEAKERS.TXT").write_bytes(b"")
    samples, refused = read("audio_text", audio)
    assert set(samples) == set(keys)
    reasons = {"loose.flac": "audio without transcript", "SPEAKERS.TXT": "file of another kind"}
    assert {k: r.reason for k, r in refused.items()} == reasons
    write_tar(web / "X.TAR", [("a.png", png(images(1)[0])), ("a.txt", b"words")])
    samples, refused = read("webdataset", web)
    assert list(samples) == ["X/a"] and set(refused) == {"NOTES.doc"}


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds neither captions\.jsonl nor metadata"):
        read("image_caption", tmp_path)
