"""What a config names and the disk does not hold: prepared where it says from what, and never by accident."""

import pytest

from mmoe.data.config import SourceConfig
from mmoe.errors import ConfigError
from mmoe.preparation.ensure_prepared import ensure_prepared
from mmoe.tokenizers.text import TextConfig

BYTES = TextConfig()
SMALL_DRIVE = {"recordings": 3, "slices": [1, 1], "height": 32, "width": 64}
CODEC = {"heldout_share": 0, "audio": {"mel": {"codebook_size": 4}}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder that would be worth preparing, with a prepared source and raw texts beside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("note.txt", "texts/a.txt", "texts/b.txt", "out/poems/source.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"one of {name}\n\ntwo\n\nthree\n\n" * 20)
    return tmp_path


def everything(folder):
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    "source, sentence",
    [
        (
            {"shards": "out/peoms"},
            r"data.sources.s.shards: out/peoms does not exist \(the nearest that exists is out/poems\); correct it, or "
            r"give the text recordings .* in data.sources.s.input",
        ),
        (
            {"shards": "nowhere/at/all"},
            r"nowhere/at/all does not exist \(the nearest that exists is \.\)",
        ),
        (
            {"shards": "out/new", "input": "text"},
            r"data.sources.s.input, text, does not exist either \(the nearest that exists is texts\); correct one",
        ),
    ],
)
def test_a_mistyped_folder_is_named_with_the_nearest_and_nothing_is_prepared(here, source, sentence):
    before = everything(here)
    with pytest.raises(ConfigError, match=sentence):
        ensure_prepared({"s": SourceConfig(kind="text", **source)}, BYTES)
    assert everything(here) == before


def test_nothing_is_made_of_one_source_where_another_cannot_be(here):
    before = everything(here)
    sources = {
        "good": SourceConfig(kind="text", input="texts", shards="out/good"),
        "bad": SourceConfig(kind="text", shards="out/bad"),
    }
    with pytest.raises(ConfigError, match="data.sources.bad.input"):
        ensure_prepared(sources, BYTES)
    assert everything(here) == before


def test_a_tokenizer_is_not_fitted_to_the_current_folder(here):
    """Of a source that is prepared and has no input, there is no text to fit it to."""
    text = TextConfig(path="out/poem.json", vocabulary_size=300)
    with pytest.raises(ConfigError, match="tokenizers.text.path: out/poem.json does not exist .*data.sources.s.input"):
        ensure_prepared({"s": SourceConfig(kind="text", shards="out/poems")}, text)
    assert not (here / "out" / "poem.json").exists()


def test_what_has_an_input_or_needs_none_is_prepared_and_said(here, caplog):
    sources = {
        "texts": SourceConfig(
            kind="text", input="texts", shards="out/texts", options={"prepare": {"heldout_share": 0}}
        ),
        "drive": SourceConfig(kind="simulated_drive", shards="out/drive", options=SMALL_DRIVE | {"prepare": CODEC}),
    }
    ensure_prepared(sources, BYTES)
    said = caplog.text
    assert "out/texts does not exist: preparing source texts there, from text in texts" in said
    assert "out/drive does not exist: preparing source drive there, from simulated_drive" in said
    assert (here / "out/texts/source.json").is_file() and (here / "out/drive/source.json").is_file()
