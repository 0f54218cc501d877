"""Rows are rows, whatever they are stored as: JSON, CSV, parquet, Arrow; texts, paths or bytes in their columns."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe.errors import DataError
from mmoe.preparation.sources import columnar
from mmoe.schema.bounds import Bounds, bounded_by
from tests.data.recordings import images, png, wav
from tests.data.recordings_tables import MEDIA, hub_table, save_splits, save_to_disk, write_stream, write_table
from tests.preparation.sources.test_sources import read, texts
from tests.preparation.test_prepare import SMALL_CODEC, run

KINDS = ("json", "jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet", "stream.arrow", "file.arrow")
SAID = ["plain", 'a "quoted", cell;\twith\nlines\r\nand commas', "吾輩は猫である", " two spaces ", "5", '"', "last"]
PICTURES = [png(pixels) for pixels in images(7)]
IN_LINES = [" ".join(said.split()) for said in SAID]  # as a .tsv can hold them, which has no quotes
CLIPS = [wav((np.arange(900) * (n + 3)) % 2000 - 1000) for n in range(7)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_any_table_gives_the_texts_that_were_written(tmp_path, kind):
    said = IN_LINES if kind == "tsv" else SAID
    write_table(tmp_path / f"rows.{kind}", {"id": [str(i) for i in range(7)], "body": said})
    samples, refused = read("text", tmp_path, columns={"text": "body"})
    assert not refused and [texts(s)[0] for s in samples.values()] == said
    assert {s.recording for s in samples.values()} == {f"rows.{kind}"}
    assert [key[-7:] for key in samples] == [f"-{i:06d}" for i in range(7)]
    alone, _ = read("text", tmp_path / f"rows.{kind}", columns={"text": "body"})
    assert {k: s.members for k, s in alone.items()} == {k: s.members for k, s in samples.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["image_caption", "audio_text"])
def test_paths_in_a_column_of_any_table_are_read_relative_to_it(tmp_path, kind, source):
    said = IN_LINES if kind == "tsv" else SAID
    media, suffix, contents = ("photo", "png", PICTURES) if source == "image_caption" else ("clip", "wav", CLIPS)
    for number, content in enumerate(contents):
        (tmp_path / f"set/files/{number}.{suffix}").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/files/{number}.{suffix}").write_bytes(content)
    write_table(tmp_path / f"set/rows.{kind}", {media: [f"files/{n}.{suffix}" for n in range(7)], "said": said})
    columns = {"image_caption": {"image": media, "caption": "said"}, "audio_text": {"audio": media, "text": "said"}}
    samples, refused = read(source, tmp_path, columns=columns[source])
    assert not refused and list(samples) == [f"set/files/{n}" for n in range(7)]
    assert [texts(s)[0] for s in samples.values()] == said
    assert [next(iter(s.members.values())) for s in samples.values()] == contents
    if not kind.startswith("jsonl"):  # which alone is a manifest
        alone, _ = read(source, tmp_path / f"set/rows.{kind}", columns=columns[source])
        assert [s.members for s in alone.values()] == [s.members for s in samples.values()]


@pytest.mark.parametrize("table", ["rows.csv", "rows.json", "rows.parquet", "own"])
@pytest.mark.parametrize("source", ["image_caption", "audio_text"])
def test_files_outside_of_the_folder_have_the_keys_of_their_rows(tmp_path, monkeypatch, source, table):
    media, suffix, contents = ("image", "png", PICTURES) if source == "image_caption" else ("audio", "wav", CLIPS)
    text, own = ("caption", "captions.jsonl") if source == "image_caption" else ("text", "transcripts.jsonl")
    places = ["out/0", "out/1", "set.x/2", "set.x/3"]
    for place, content in zip(places, contents):
        (tmp_path / f"{place}.{suffix}").parent.mkdir(exist_ok=True)
        (tmp_path / f"{place}.{suffix}").write_bytes(content)
    names = [f"../out/./0.{suffix}", f"{tmp_path}/out/1.{suffix}", f"../out/0.{suffix}"]
    names += [f"{tmp_path}/set.x/2.{suffix}", f"../set.x/3.{suffix}"]  # of which these lie in it
    table = own if table == "own" else table
    write_table(tmp_path / "set.x" / table, {media: names, text: list("abcde")})
    stem = table.partition(".")[0]
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "set.x", Path("set.x")):
        samples, refused = read(source, root)
        assert not refused and {key: texts(s) for key, s in samples.items()} == {
            f"{stem}-000000": ["a"],
            f"{stem}-000001": ["b"],
            f"{stem}-000002": ["c"],
            "2": ["d"],
            "3": ["e"],
        }
        out = [f"../out/0.{suffix}", f"{tmp_path}/out/1.{suffix}", f"../out/0.{suffix}"]
        assert [s.recording for s in samples.values()] == [*out, "2", "3"]
        assert [s.members[f"{media}.{suffix}"] for s in samples.values()] == [contents[n] for n in (0, 1, 0, 2, 3)]
    found, _ = run(source, tmp_path / "set.x", tmp_path / "to", prepare=SMALL_CODEC | {"heldout_share": 0.3})
    assert sum(split.samples for split in found.splits.values()) == 5 and not found.quarantined


@pytest.mark.parametrize("stored", ["parquet", "saved", "splits"])
@pytest.mark.parametrize("cell", ["both", "bytes", "plain"])
@pytest.mark.parametrize("source", ["image_caption", "audio_text"])
def test_bytes_in_tables_of_the_hub_are_the_members(tmp_path, stored, cell, source):
    folder = tmp_path / "in"
    media, member, contents = (
        ("image", "image.png", PICTURES) if source == "image_caption" else ("audio", "audio.wav", CLIPS)
    )
    cells = {
        "both": [{"bytes": content, "path": f"{n}.bin"} for n, content in enumerate(contents)],
        "bytes": [{"bytes": content, "path": None} for content in contents],
        "plain": contents,
    }[cell]
    table = hub_table({media: cells, "text": SAID}, **({} if cell == "plain" else {media: media.title()}))
    if stored == "parquet":
        (folder / "data").mkdir(parents=True)
        pq.write_table(table, folder / "data/train-00000-of-00001.parquet", row_group_size=3)
        stem = "data/train-00000-of-00001"
    elif stored == "saved":
        save_to_disk(folder, table, shards=1)
        stem = "data-00000-of-00001"
    else:
        save_splits(folder, {"test": table.slice(0, 2), "train": table.slice(2)})
        stem = None
    samples, refused = read(source, folder)
    assert not refused
    assert [s.members[member] for s in samples.values()] == contents
    assert [texts(s)[0] for s in samples.values()] == SAID
    assert [s.recording for s in samples.values()] == list(samples)
    if stem is not None:
        assert list(samples) == [f"{stem}-{n:06d}" for n in range(7)]
    else:
        assert [key.partition("/")[0] for key in samples] == ["test"] * 2 + ["train"] * 5
    found, _ = run(source, folder, tmp_path / "out", prepare=SMALL_CODEC | {"heldout_share": 0.3})
    assert sum(split.samples for split in found.splits.values()) == 7 and not found.quarantined


def test_sizes_in_bytes_and_in_rows_are_not_added_up(tmp_path):
    rows = [f"sentence {n}, which is as long as the others" for n in range(8)]
    for number, suffix in enumerate(("jsonl", "jsonl", "parquet", "parquet")):
        write_table(tmp_path / f"in/{suffix}/{number}.{suffix}", {"text": [f"{number}: {row}" for row in rows]})
    prepare = {"heldout_share": 0.5, "heldout_by": "size"}
    message = r"sizes do not add up: that of 'jsonl/0.jsonl' in bytes, that of 'parquet/2.parquet' in rows; leave"
    with pytest.raises(DataError, match=message):
        run("text", tmp_path / "in", tmp_path / "out", prepare=prepare)
    for kind in ("jsonl", "parquet"):
        manifest, _ = run("text", tmp_path / "in" / kind, tmp_path / kind, prepare=prepare)
        assert manifest.splits["heldout"].samples == 8
    manifest, _ = run("text", tmp_path / "in", tmp_path / "out", prepare={"heldout_share": 0.5})
    assert manifest.splits["heldout"].samples == 16


def test_a_list_of_captions_gives_a_sample_each_of_one_recording(tmp_path):
    cells = [{"bytes": content, "path": None} for content in PICTURES[:3]]
    table = hub_table({"image": cells, "caption": [["a", "b", "c"], ["d"], []]}, image="Image")
    pq.write_table(table, tmp_path / "x.parquet")
    samples, refused = read("image_caption", tmp_path / "x.parquet")
    assert {key: texts(s)[0] for key, s in samples.items()} == {
        "x-000000": "a",
        "x-000000+2": "b",
        "x-000000+3": "c",
        "x-000001": "d",
    }
    assert {s.recording for s in samples.values()} == {"x-000000", "x-000001"}
    assert {key: r.reason for key, r in refused.items()} == {"x-000002": "malformed row"}


def test_rows_of_one_path_are_one_image_on_one_side_of_the_split(tmp_path):
    """As COCO stands on the hub: a row a caption, the image in each of them; nothing is a duplicate of its own."""
    cells = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(PICTURES) for _ in range(3)]
    captions = [f"image {n}, words {k}" for n in range(len(PICTURES)) for k in range(3)]
    (tmp_path / "set").mkdir()
    for half in range(2):  # the shards of a set may part the rows of an image
        part = slice(half * 7, None if half else 7)
        table = hub_table({"image": cells[part], "caption": captions[part]}, image="Image")
        pq.write_table(table, tmp_path / f"set/{half}.parquet", row_group_size=4)
    manifest, _ = run("image_caption", tmp_path / "set", tmp_path / "out", prepare={"heldout_share": 0.5})
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    assert train.samples + heldout.samples == len(captions) and not manifest.removed
    recordings = [sample.recording for sample in read("image_caption", tmp_path / "set")[0].values()]
    assert recordings[::3] == recordings[1::3] == recordings[2::3] and len(set(recordings)) == len(PICTURES)


def test_a_table_is_listed_without_the_bytes_in_it_and_each_part_is_read_once(tmp_path, monkeypatch):
    cells = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(PICTURES)]
    pq.write_table(hub_table({"image": cells, "text": SAID}, image="Image"), tmp_path / "x.parquet", row_group_size=3)
    asked = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: asked.append((group, *columns)) or original(self, group, columns=columns),
    )
    columnar._part.cache_clear()
    read("image_caption", tmp_path)
    listed = [(group, name) for group in range(3) for name in ("text", "image.path")]
    assert asked == [*listed, *((group, "image") for group in range(3))]


def test_a_path_in_place_of_the_bytes_is_read_beside_the_table(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": None}, None]
    save_to_disk(tmp_path, hub_table({"image": cells, "text": list("abcd")}, image="Image"), shards=1)
    samples, refused = read("image_caption", tmp_path)
    assert [s.members["image.png"] for s in samples.values()] == [PICTURES[0]]
    assert [r.reason for r in refused.values()] == ["missing file", "malformed row", "malformed row"]


def test_a_saved_set_is_what_its_state_names(tmp_path):
    save_to_disk(tmp_path / "set", hub_table({"text": SAID}), shards=3)
    write_stream(tmp_path / "set/cache-0123456789abcdef.arrow", hub_table({"text": ["of a map"]}))
    samples, refused = read("text", tmp_path)
    assert [texts(s)[0] for s in samples.values()] == SAID
    assert list(refused) == ["set/cache-0123456789abcdef.arrow"]
    (tmp_path / "set/data-00001-of-00003.arrow").unlink()
    samples, refused = read("text", tmp_path)
    assert len(samples) == 5 and refused["set/data-00001-of-00003.arrow"].reason == "missing file"
    named = ["/abs/x.arrow", "../y.arrow", "data-00000-of-00003.arrow"]
    (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in named]}))
    samples, refused = read("text", tmp_path)
    missing = {key for key, refusal in refused.items() if refusal.reason == "missing file"}
    assert samples and missing == {"/abs/x.arrow", "set/../y.arrow"}
    (tmp_path / "set/state.json").write_text("{}")
    samples, refused = read("text", tmp_path)
    assert not samples and "does not name the tables" in str(refused["set/state.json"])


def test_a_truncated_arrow_file_gives_what_it_has_and_a_damaged_one_is_refused(tmp_path):
    write_stream(tmp_path / "cut.arrow", hub_table({"text": SAID}))
    whole = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "none.arrow").write_bytes(b"not Arrow at all")
    samples, refused = read("text", tmp_path)
    assert [texts(s)[0] for s in samples.values()] == SAID[: len(samples)] and len(samples) in (3, 6)
    assert {key: r.reason for key, r in refused.items()} == {"cut": "unreadable file", "none": "unreadable file"}
    (tmp_path / "other.jsonl").write_text('{"text": "whole"}')
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            damaged[at] = rng.integers(256)
        (tmp_path / "cut.arrow").write_bytes(damaged)
        samples, refused = read("text", tmp_path)
        assert "other-000000" in samples and "none" in refused


def test_odd_rows_of_csv_are_refused_with_their_lines(tmp_path):
    lines = [
        b"\xef\xbb\xbfid,text",
        b"0,first",
        b"1,two,three",
        b"",
        b"2,caf\xe9",
        b'3,"over',
        b'two lines"',
        b'4,"x"y',
        b"5,",
        b"6",
        b'7,"never closed',
        b"8,lost",
    ]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(lines))
    samples, refused = read("text", tmp_path)
    assert {key: texts(s)[0] for key, s in samples.items()} == {
        "a-000000": "first",
        "a-000001": "over\r\ntwo lines",
    }
    assert {key: r.reason for key, r in refused.items()} == {
        "a-line-3": "malformed row",
        "a-line-5": "text is not UTF-8",
        "a-line-8": "malformed row",
        "a-000002": "malformed row",
        "a-line-10": "malformed row",
        "a-line-11": "malformed row",
    }
    place = tmp_path / "a.csv"
    assert str(refused["a-line-3"]).startswith(f"{place}, line 3 has 3 cells, and the head names 2 columns")
    assert str(refused["a-line-5"]).startswith(f"{place}, line 5: byte 41 (0xe9) is not UTF-8")
    assert (place.read_bytes()[41]) == 0xE9
    assert str(refused["a-line-11"]).startswith(f"{place}, lines 11 to 12 are not CSV")
    assert "line 9: 'text' is missing" in str(refused["a-000002"])


def test_quotes_of_a_tsv_are_characters_and_every_line_is_a_row(tmp_path):
    said = ['"Come in', 'he said"', '"Stop," he said.', "it is", '"', '5" wide']
    for number, content in enumerate(CLIPS[: len(said)]):
        (tmp_path / f"clips/{number}.wav").parent.mkdir(exist_ok=True)
        (tmp_path / f"clips/{number}.wav").write_bytes(content)
    rows = ["client_id\tpath\tsentence\tup_votes"] + [f"c\tclips/{n}.wav\t{text}\t2" for n, text in enumerate(said)]
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    samples, refused = read("audio_text", tmp_path, columns={"audio": "path"})
    assert not refused and {key: texts(s) for key, s in samples.items()} == {
        f"clips/{n}": [text] for n, text in enumerate(said)
    }
    documents, refused = read("text", tmp_path / "train.tsv", columns={"text": "sentence"})  # which reads by its place
    assert not refused and [texts(s) for s in documents.values()] == [[text] for text in said]


BROKEN = {
    "not UTF-8 in the middle": (b'"multi\nli\xffne\nrest of the cell",3', "text is not UTF-8"),
    "quotes in quotes": (b'"one, \nwith "inner" quotes,\nand, more\nfin",3', "malformed row"),
    "a line that is too long": (b'"one,\n' + b'",""' * 301 + b'",\nand, more\nfin",3', "beyond the bounds"),
    "one line": (b'"x"y,3', "malformed row"),
    "never closed": (b'"open,3\n"closed",4', "malformed row"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_line_of_a_broken_row_of_csv_becomes_a_row(tmp_path, name):
    broken, reason = BROKEN[name]
    (tmp_path / "a.csv").write_bytes(b'text,n\n"first, of\nall",1\n' + broken + b'\n5" wide,6\n"last\none",7\n')
    with bounded_by(Bounds(row_bytes=1000)):
        samples, refused = read("text", tmp_path)
    assert [texts(s) for s in samples.values()] == [["first, of\nall"], ['5" wide'], ["last\none"]]
    assert {key: r.reason for key, r in refused.items()} == {"a-line-4": reason}


def test_a_list_of_json_gives_its_objects_and_the_rest_is_counted(tmp_path):
    rows = ['{"text": "a ] } \\" \\\\", "n": [[1], {"x": {}}]}', "null", '"]"', "-1.5e3", "[]", '{"text": "b"}']
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n[" + " ,\n".join(rows).encode() + b"]\n")
    (tmp_path / "cut.json").write_text('[{"text": "c"}, {"text": "d"')
    (tmp_path / "more.json").write_text('[{"text": "f"}]\n[{"text": "g"}]')
    (tmp_path / "other.json").write_text('{"text": "no list"}')
    (tmp_path / "none.json").write_text("")
    (tmp_path / "wide.json").write_bytes('[{"text": "e"}]'.encode("utf-16"))
    samples, refused = read("text", tmp_path)
    found = {key: texts(s)[0] for key, s in samples.items()}
    assert found == {"a-000000": 'a ] } " \\', "a-000005": "b", "cut-000000": "c", "more-000000": "f"}
    assert {key: r.reason for key, r in refused.items()} == {
        **{f"a-{n:06d}": "malformed row" for n in (1, 2, 3, 4)},
        "cut": "unreadable file",
        "more": "malformed row",
        "other": "malformed row",
        "none": "malformed row",
        "wide": "text is not UTF-8",
    }
    assert "is a JSON NoneType, not an object" in str(refused["a-000001"])
    assert "holds no list of rows; give one" in str(refused["other"])
    assert str(refused["more"]).startswith(f"{tmp_path / 'more.json'}, byte 16: more stands behind the list")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_columnar_table_names_each_column_once_and_one_at_least(tmp_path, kind):
    write = pq.write_table if kind == "parquet" else lambda table, path: write_stream(path, table)
    write(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["text", "text"]), tmp_path / f"twice.{kind}")
    write(pa.table({}), tmp_path / f"none.{kind}")
    write(pa.table({"text": ["good"]}), tmp_path / f"good.{kind}")
    samples, refused = read("text", tmp_path)
    assert [texts(s) for s in samples.values()] == [["good"]]
    said = {key: str(refusal).partition("; ")[0] for key, refusal in refused.items()}
    assert said == {
        "twice": f"{tmp_path}/twice.{kind} names the column 'text' twice",
        "none": f"{tmp_path}/none.{kind} has no columns",
    }


def test_heads_of_csv_say_what_separates_and_must_name_each_column_once(tmp_path):
    (tmp_path / "a.csv").write_text("id;text\n1;one, and more\n")
    (tmp_path / "b.csv").write_text("text,text\nx,y\n")
    (tmp_path / "c.csv").write_bytes("text\nx\n".encode("utf-16"))
    (tmp_path / "d.csv").write_text("")
    (tmp_path / "e.csv").write_text(",text\n0,index of pandas\n")
    (tmp_path / "f.csv").write_text(" \ntext\nx\n")
    samples, refused = read("text", tmp_path)
    assert [texts(s)[0] for s in samples.values()] == ["one, and more", "index of pandas"]
    reasons = {"b": "malformed row", "c": "text is not UTF-8", "d": "no such column", "f": "no such column"}
    assert str(refused["f"]).startswith(f"{tmp_path}/f.csv, line 1 is blank; it must name the columns")
    assert {key: r.reason for key, r in refused.items()} == reasons and "names the column 'text' twice" in str(
        refused["b"]
    )
    with bounded_by(Bounds(row_bytes=100)):
        (tmp_path / "e.csv").write_text('text\nshort\n"' + "long\n" * 50 + '"\n' + "x" * 200 + "\nshort too\n")
        samples, refused = read("text", tmp_path / "e.csv")
    assert texts(samples["e-000000"]) == ["short"] and {r.reason for r in refused.values()} >= {"beyond the bounds"}


WRONG = {
    "text": ({"text": "boby"}, {"body": ["x"], "id": ["1"]}, "'boby'; did you mean body?", "columns.text"),
    "image_caption": ({"caption": "captoin"}, {"image": ["x"], "caption": ["1"]}, "'captoin'; did", "columns.caption"),
    "audio_text": ({"audio": "wave"}, {"audio": ["x"], "text": ["1"]}, "'wave'.", "columns.audio"),
}


@pytest.mark.parametrize("kind", ["csv", "parquet", "stream.arrow"])
@pytest.mark.parametrize("source", WRONG)
def test_a_wrong_column_is_one_sentence_with_the_columns_that_are_there(tmp_path, source, kind):
    columns, content, said, option = WRONG[source]
    write_table(tmp_path / f"in/rows.{kind}", content)
    with pytest.raises(DataError) as caught:
        run(source, tmp_path / "in", tmp_path / "out", columns=columns)
    message = str(caught.value)
    assert f"has no column {said}" in message and message.endswith(
        f"Set the option {option} to one of {', '.join(content)}"
    )


def test_each_of_several_caption_columns_must_be_there(tmp_path):
    write_table(tmp_path / "rows.csv", {"image": ["x.png"], "caption": ["1"], "title": [""]})
    read("image_caption", tmp_path, columns={"caption": ("caption", "title")})
    with pytest.raises(DataError, match=r"has no column 'titel'; did you mean title\?"):
        read("image_caption", tmp_path, columns={"caption": ("caption", "titel")})


def test_a_row_of_json_without_the_column_names_those_that_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "x", "id": 1}\n{"text": "y"}\n')
    samples, refused = read("text", tmp_path)
    assert list(samples) == ["a-000001"]
    assert "'text' is missing; did you mean txt? the row has txt, id" in str(refused["a-000000"])


@pytest.mark.parametrize("place", ["a.jsonl", "captions.jsonl", "metadata.jsonl", "a.csv"])
def test_classes_and_captions_are_read_in_any_place(tmp_path, place):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    write_table(tmp_path / place, {"image": ["a.png"], "label": ["cat"], "caption": ["x"]})
    samples, refused = read("image_caption", tmp_path, columns={"image": "image", "caption": "label"})
    assert not refused and texts(samples["a"]) == ["cat"]
    with pytest.raises(DataError, match=r"'lable'; did you mean label\? Set the option columns.caption to one of"):
        read("image_caption", tmp_path, columns={"caption": "lable"})
    with pytest.raises(DataError, match=r"'photo'. Set the option columns.image to one of image, label, caption"):
        read("image_caption", tmp_path, columns={"image": "photo"})


def test_numbers_of_classes_are_read_as_their_names(tmp_path):
    cells = [{"bytes": content, "path": None} for content in PICTURES[:3]]
    table = pa.table({"image": pa.array(cells, MEDIA), "label": pa.array([1, 0, 7], pa.int64())})
    feature = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    said = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})}
    pq.write_table(table.replace_schema_metadata(said), tmp_path / "x.parquet")
    samples, refused = read("image_caption", tmp_path, columns={"caption": "label"})
    assert [texts(s) for s in samples.values()] == [["dog"], ["cat"]]
    assert "'label' is 7, not a string" in str(refused["x-000002"])
    assert [texts(s) for s in read("text", tmp_path, columns={"text": "label"})[0].values()] == [["dog"], ["cat"]]


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl.gz", "parquet", "stream.arrow"])
def test_a_table_of_images_that_is_damaged_costs_itself(tmp_path, kind):
    for number, content in enumerate(PICTURES[:2]):
        (tmp_path / f"{number}.png").write_bytes(content)
    write_table(tmp_path / "whole.csv", {"image": ["0.png"], "caption": ["x"]})
    write_table(tmp_path / f"cut.{kind}", {"image": ["1.png"] * 900, "caption": [f"a caption {n}" for n in range(900)]})
    whole = (tmp_path / f"cut.{kind}").read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    samples, refused = read("image_caption", tmp_path)
    assert texts(samples["0"]) == ["x"] and "unreadable file" in {refusal.reason for refusal in refused.values()}


def test_a_file_that_is_no_table_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    with pytest.raises(DataError, match=r"a.png is no table \(.jsonl, .json, .csv, .tsv, .parquet, .arrow\); give one"):
        read("image_caption", tmp_path / "a.png")


def test_addresses_are_not_fetched(tmp_path):
    write_table(tmp_path / "rows.csv", {"image": ["https://example.org/a.png"], "caption": ["x"]})
    _, refused = read("image_caption", tmp_path)
    assert [r.reason for r in refused.values()] == ["missing file"] and "nothing is downloaded" in str(
        *refused.values()
    )
