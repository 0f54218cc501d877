"""A recipe for recordings of one's own: it is found what they are, and what is printed next works as printed."""

import csv
import json
import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from mmoe.commands import main as cli
from mmoe.commands import session
from mmoe.config.load import load
from mmoe.errors import ConfigError, DataError
from mmoe.planning.first_recipe import recipe_name
from mmoe.preparation.ensure_prepared import ensure_prepared
from mmoe.preparation.survey import detect, survey
from mmoe.recipe.config import RunConfig
from tests.data.recordings import images, png, wav, write_jsonl
from tests.data.recordings_robot import write_lerobot


def write_imagefolder(folder):
    """As Hugging Face's datasets write it."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, pixels in enumerate(images(12)):
            (folder / f"{number:03d}.png").write_bytes(png(pixels))
            table.writerow([f"{number:03d}.png", f"image number {number}"])


def write_audio(folder):
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription"])
        for number in range(12):
            tone = np.sin(np.arange(6000) * 0.03 * (number + 2)) + 0.2 * np.sin(np.arange(6000) * 0.0007 * number**2)
            (folder / f"{number}.wav").write_bytes(wav(tone * 8000))
            table.writerow([f"{number}.wav", f"words {number}"])


def write_robot(folder):
    write_lerobot(folder, [12, 11, 13], cameras=("observation.images.top", "observation.images.wrist-Left"))


def write_texts(folder):
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(f"Line {i} of text {number}.\n\n" for i in range(200)))


WRITERS = {
    "image_caption": write_imagefolder,
    "audio_text": write_audio,
    "lerobot": write_robot,
    "text": write_texts,
}

# For the time of a test: the recipe's own data, tokenizers, losses and lengths, and a model of nearly nothing.
SMALL = ("model.d_model=16", "model.n_layers=1", "model.intermediate_size=16", "model.moe=null", "data.workers=0")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def prepare(sources, text, extensions):  # in this process, which is quicker
        ensure_prepared(sources, text)

    monkeypatch.setattr(session, "prepare_missing", prepare)
    return tmp_path


def mmoe(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, arguments)
    if done.exception:
        raise done.exception
    return done.output


@pytest.mark.parametrize("named", ["auto", "kind"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_recipe_is_written_for_what_lies_there(here, kind, named):
    WRITERS[kind](here / "my data")
    said = mmoe("init", kind if named == "kind" else "auto", "my data")
    config = load(RunConfig, "my_data.yaml")
    assert config.data.sources["my_data"].kind == kind and f"of kind {kind} in" in said
    assert config.training.run == "runs/my_data" and not (here / "runs").exists() and not (here / "out").exists()
    if kind == "lerobot":
        cameras = config.data.sources["my_data"].options["cameras"]
        assert cameras == {"observation.images.top": "top", "observation.images.wrist-Left": "wrist_left"}
    if named == "auto":
        return
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  mmoe ")]
    assert [command[1] for command in commands] == ["train", "evaluate"]
    mmoe(*commands[0][1:], *SMALL, "--stop-after", "1")
    record = json.loads((here / "runs/my_data/metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 1 and np.isfinite(record["loss"])
    if kind == "text":
        assert "CE of text, my_data" in mmoe(*commands[1][1:])


def test_of_one_recording_that_cannot_be_cut_nothing_is_held_out_and_that_is_said(here):
    (here / "my data").mkdir()
    (here / "my data/a.txt").write_text("One text, and no more.\n")
    said = mmoe("init", "auto", "my data")
    assert "nothing is held out" in said and "mmoe evaluate" not in said
    assert load(RunConfig, "my_data.yaml").data.sources["my_data"].options["prepare"] == {"heldout_share": 0}
    mmoe("train", "my_data.yaml", *SMALL, "--stop-after", "1")
    (here / "out").rename(here / "done")
    key = "data.sources.my_data.options.prepare.heldout_share"
    fresh = ("my_data.yaml", *SMALL, "--stop-after", "1", "training.run=runs/other")
    with pytest.raises(DataError, match=f"no sample for the split heldout; add recordings, or set {key}=0"):
        mmoe("train", *fresh, f"{key}=0.2")
    mmoe("train", *fresh, f"{key}=0")


def test_of_several_readers_the_one_that_refuses_least_is_taken(here):
    write_imagefolder(here / "images")
    (here / "images/metadata.csv").unlink()
    write_jsonl(here / "images/metadata.jsonl", [{"file_name": f"{n:03d}.png", "text": f"n {n}"} for n in range(12)])
    write_jsonl(here / "images/more.jsonl", [{"text": f"a text beside images, {n}"} for n in range(20)])
    assert survey("text", "images").refused.total() == 12 < survey("text", "images").items
    assert detect("images").kind == "image_caption"


def test_the_column_of_the_captions_is_found(here):
    write_imagefolder(here / "images")
    table = here / "images/metadata.csv"
    table.write_text(table.read_text().replace("file_name,text", "file_name,prompt"))
    mmoe("init", "auto", "images")
    assert load(RunConfig, "images.yaml").data.sources["images"].options["columns"] == {"caption": "prompt"}


def test_nothing_is_written_over(here):
    write_texts(here / "texts")
    mmoe("init", "text", "texts")
    with pytest.raises(ConfigError, match=r"texts.yaml exists already.*another recipe by --out"):
        mmoe("init", "text", "texts")
    (here / "out/b").mkdir(parents=True)
    with pytest.raises(ConfigError, match="out/b exists already"):
        mmoe("init", "text", "texts", "--out", "b.yaml")
    mmoe("init", "text", "texts", "--out", "recipes/c.yaml")
    assert load(RunConfig, "recipes/c.yaml").training.run == "runs/c"


def test_options_are_kept_and_a_simulation_needs_no_input(here):
    mmoe("init", "simulated_drive", "-", "recordings=40", "prepare.heldout_share=0.3")
    source = load(RunConfig, "simulated_drive.yaml").data.sources["simulated_drive"]
    assert source.input is None and source.options == {"recordings": 40, "prepare": {"heldout_share": 0.3}}
    (here / "held.txt").write_text("drive-000003\n")
    mmoe("init", "simulated_drive", "-", "recordings=4", "prepare.heldout_list=held.txt", "--out", "listed.yaml")
    (source,) = load(RunConfig, "listed.yaml").data.sources.values()
    assert source.options["prepare"] == {"heldout_list": "held.txt"}  # which takes no share beside it


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_the_column_of_the_texts_is_found(here, name):
    rows = [{"id": f"{n}", "body": f"a longer text, number {n}"} for n in range(8)]
    if name.endswith("l"):
        write_jsonl(here / name, rows)
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.Table.from_pylist(rows), here / name)
    mmoe("init", "text", name, "prepare.heldout_share=0")
    assert load(RunConfig, "rows.yaml").data.sources["rows"].options["columns"] == {"text": "body"}


def test_what_no_reader_takes_and_what_several_take_is_said_with_the_kinds(here):
    (here / "empty").mkdir()
    with pytest.raises(DataError, match=r"not what any reader takes.*in place of auto: .*audio_text.*webdataset"):
        mmoe("init", "auto", "empty")
    write_imagefolder(here / "images")
    (here / "images/metadata.csv").unlink()
    with pytest.raises(DataError, match="not what any reader takes"):
        mmoe("init", "auto", "images")
    with pytest.raises(DataError, match="nothing says what is in them"):
        mmoe("init", "image_caption", "images")
    with pytest.raises(DataError, match="nowhere does not exist"):
        mmoe("init", "auto", "nowhere")
    with pytest.raises(ConfigError, match="name its kind in place of auto"):
        mmoe("init", "auto", "images", "a=1")
    write_audio(here / "clips")
    lines = [{"audio_filepath": f"{n}.wav", "text": f"words {n}"} for n in range(12)]
    write_jsonl(here / "clips/manifest.jsonl", lines)
    with pytest.raises(DataError, match="in several ways; say its kind in place of auto: audio_text, .*text"):
        mmoe("init", "auto", "clips/manifest.jsonl")


@pytest.mark.parametrize(
    "path, name", [("a/b c.d", "b_c"), ("/x/übung.jsonl", "bung"), ("-", "recordings"), ("a/train.v2.tar", "train_v2")]
)
def test_a_name_can_be_a_key_of_an_override(path, name):
    assert recipe_name(path) == name
