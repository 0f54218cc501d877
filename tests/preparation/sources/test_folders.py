"""Folders as others write them: Hugging Face's imagefolder and audiofolder, LJSpeech, a text beside each file."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from mmoe.errors import DataError
from mmoe.schema.modality import Modality
from tests.data.recordings import images, png, wav, write_jsonl
from tests.data.recordings_webdataset import write_tar
from tests.preparation.sources.test_sources import read


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(images(1)[0] + number))


def write_clips(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(wav(np.arange(800) + number))


def texts(samples):
    found = {}
    for key, sample in samples.items():
        (text,) = (segment.text for segment in sample.segments if segment.modality == Modality.TEXT)
        found[key] = text
    return found


def write_table(file, rows):
    if file.suffix == ".jsonl":
        write_jsonl(file, rows)
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_an_imagefolder_is_read_with_its_tables_wherever_they_stand(tmp_path, suffix, column):
    write_images(tmp_path, ["train/a.png", "train/deep/b.png", "test/a.png", "test/odd.png"])
    rows = [{"file_name": "a.png", column: 'a "quoted", \nbroken text'}, {"file_name": "deep/b.png", column: "ü"}]
    write_table(tmp_path / f"train/metadata.{suffix}", rows)
    write_table(tmp_path / f"test/metadata.{suffix}", [{"file_name": "a.png", column: "of the test"}])
    samples, refused = read("image_caption", tmp_path)
    assert texts(samples) == {"train/a": 'a "quoted", \nbroken text', "train/deep/b": "ü", "test/a": "of the test"}
    assert list(refused) == ["test/odd.png"] and "captions" in str(refused["test/odd.png"])


@pytest.mark.parametrize("column", ["transcription", "text", "sentence"])
def test_an_audiofolder_is_read(tmp_path, column):
    write_clips(tmp_path, ["data/a.wav", "data/b.wav", "data/c.wav"])
    rows = [{"file_name": f"data/{name}.wav", column: f"word {name}", "speaker": "ada"} for name in "ab"]
    write_table(tmp_path / "metadata.csv", rows)
    samples, refused = read("audio_text", tmp_path)
    assert texts(samples) == {"data/a": "word a", "data/b": "word b"}
    assert {sample.recording for sample in samples.values()} == {"speaker-ada"}
    assert [refusal.reason for refusal in refused.values()] == ["audio without transcript"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_numbers_of_a_table_are_numbers_and_the_reader_s_own_column_gives_way_to_file_name(tmp_path, suffix):
    write_clips(tmp_path, ["x.wav"])
    row = {"file_name": "x.wav", "audio": "clip 7", "text": "12", "sample_rate": 8000, "samples": 800, "take": 3}
    write_table(tmp_path / f"metadata.{suffix}", [row])
    samples, refused = read("audio_text", tmp_path)
    assert not refused and texts(samples) == {"x": "12"} and samples["x"].recording == "take-3"
    write_table(tmp_path / f"metadata.{suffix}", [row | {"samples": 801}])
    assert "has samples 800" in str(read("audio_text", tmp_path)[1]["x"])


def test_a_table_s_names_are_relative_to_it_whatever_their_column(tmp_path):
    write_clips(tmp_path, ["sub/x.wav", "x.wav"])
    write_table(tmp_path / "sub/metadata.jsonl", [{"audio": "x.wav", "text": "below"}])
    write_table(tmp_path / "sub/metadata.csv", [{"file_name": "x.wav", "text": "the same once more"}])
    samples, refused = read("audio_text", tmp_path)
    assert texts(samples) == {"sub/x": "below"} and sorted(refused) == ["sub/metadata.csv", "x.wav"]


def test_ljspeech_is_read_by_its_normalized_text(tmp_path):
    write_clips(tmp_path, ["wavs/LJ001-0001.wav", "wavs/LJ001-0002.wav", "wavs_22k/LJ001-0001.wav"])
    lines = [
        'LJ001-0001|Printed in 1455, "then"|Printed in fourteen fifty-five, "then"',
        "LJ001-0002|sh\u2028ort\r",
        "",
    ]
    lines += ["gone|x|y", "a"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    samples, refused = read("audio_text", tmp_path)
    assert texts(samples) == {
        "wavs/LJ001-0001": 'Printed in fourteen fifty-five, "then"',
        "wavs/LJ001-0002": "sh\u2028ort",
    }
    assert sorted(refused) == ["metadata-line-4", "metadata-line-5", "wavs_22k/LJ001-0001.wav"]
    assert "names no file" in str(refused["metadata-line-4"])
    alone, refused = read("audio_text", tmp_path / "metadata.csv")
    assert alone == samples and sorted(refused) == ["metadata-line-4", "metadata-line-5"]


@pytest.mark.parametrize("folder", ["wavs", "clips"])
@pytest.mark.parametrize("columns", [{}, {"audio": "clip"}])
def test_a_table_of_bars_with_a_head_is_no_ljspeech(tmp_path, folder, columns):
    write_clips(tmp_path, [f"{folder}/a.wav", f"{folder}/b.wav"])
    rows = [f"{columns.get('audio', 'audio')}|text", f"{folder}/a.wav|one, two", f"{folder}/b.wav|three"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    for place in (tmp_path, tmp_path / "metadata.csv"):
        samples, refused = read("audio_text", place, columns=columns)
        assert not refused and texts(samples) == {f"{folder}/a": "one, two", f"{folder}/b": "three"}


def test_a_text_beside_each_file_is_its_text(tmp_path):
    write_images(tmp_path, ["0001.jpg", "0002.PNG", "0003.png", "deep/0001.png"])
    contents = {"0001": b"\xef\xbb\xbffirst\n", "0002": b"second", "deep/0001": b"\xff", "other": b"x"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    samples, refused = read("image_caption", tmp_path)
    assert texts(samples) == {"0001": "first", "0002": "second"}
    assert sorted(refused) == ["0003.png", "deep/0001.png", "deep/0001.txt", "other.txt"]


@pytest.mark.parametrize("suffix", ["tif", "tiff", "ppm", "jfif", "BMP"])
def test_images_of_every_kind_have_texts_beside_them(tmp_path, suffix):
    image, kind = Image.fromarray(images(1)[0]), {"tif": "TIFF", "jfif": "JPEG"}.get(suffix, suffix)
    image.save(tmp_path / f"0001.{suffix}", kind)
    (tmp_path / "0001.txt").write_text("a scan")
    samples, refused = read("image_caption", tmp_path)
    assert not refused and texts(samples) == {"0001": "a scan"}
    content = (tmp_path / f"0001.{suffix}").read_bytes()
    assert samples["0001"].members[f"image.{suffix.lower()}"] == content
    write_tar(tmp_path / "tars/a.tar", [(f"0001.{suffix}", content), ("0001.txt", b"a scan")])
    samples, refused = read("webdataset", tmp_path / "tars")
    assert not refused and texts(samples) == {"a/0001": "a scan"}


def test_rows_that_cannot_be_used_are_refused_alone_and_counted(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\nb.png\n,two\na.png,x,y\nb.png,\nb.png,last\n")
    samples, refused = read("image_caption", tmp_path)
    assert texts(samples) == {"a": "one", "b+2": "last"}
    place = tmp_path / "metadata.csv"
    assert sorted(refused) == [f"{place}, line 4", "b", "metadata-line-3", "metadata-line-5"]
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,one\nb.png,"open')
    samples, refused = read("image_caption", tmp_path)
    assert texts(samples) == {"a": "one"}
    assert ["is not CSV" in str(refusal) for refusal in refused.values()] == [True, False]  # and b.png, unnamed


def test_our_own_file_comes_first_and_where_nothing_describes_all_forms_are_named(tmp_path):
    write_images(tmp_path, ["a.png"])
    with pytest.raises(DataError, match=r"captions.jsonl nor metadata.jsonl or metadata.csv .*file_name.* .txt beside"):
        read("image_caption", tmp_path)
    (tmp_path / "a.txt").write_text("beside")
    assert texts(read("image_caption", tmp_path)[0]) == {"a": "beside"}
    write_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "of a table"}])
    assert texts(read("image_caption", tmp_path)[0]) == {"a": "of a table"}
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "our own"}))
    assert texts(read("image_caption", tmp_path)[0]) == {"a": "our own"}
