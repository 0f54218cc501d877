"""A whole run on sources that lie elsewhere: prepared here, uploaded, trained on, resumed, evaluated, shown."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
import yaml

from mmoe.commands.main import app
from mmoe.data.index.shard_index import is_prepared
from mmoe.errors import DataError
from mmoe.preparation.prepare import prepare
from mmoe.tokenizers.text import TextTokenizer
from tests.data.servers import CREDENTIALS, FaultyServer, certificate, moto_server, upload
from tests.data.synthetic import MEL, write_sources

SOURCES = ("prose", "audio", "clip")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Prepared sources with an audio codec and a text tokenizer beside them."""
    root, texts = tmp_path_factory.mktemp("prepared"), tmp_path_factory.mktemp("texts")
    write_sources(root)
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text number {number}: " + "so it goes on " * (number % 7 + 2))
    prepare("text", texts, root / "prose", text_tokenizer=TextTokenizer.bytes())
    TextTokenizer.bytes().save(root / "bytes.json")
    return root


def config(root: str, folder, **data) -> str:
    tree = {
        "data": {
            "sources": {name: {"kind": "text", "shards": f"{root}/{name}"} for name in SOURCES},
            "sequence_length": 160,
            "window_documents": 40,
            "workers": 1,
        }
        | data,
        "tokenizers": {
            "text": {"path": f"{root}/bytes.json"},
            "vision": {"patch": 8, "max_patches": 12},
            "audio": {"path": f"{root}/codec.safetensors", "mel": MEL.model_dump()},
            "action": {"chunk": 4},
        },
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 32},
        "losses": {"contrastive": {"group_sequences": 1}},
        "optim": {"lr": {"peak": 1e-3}},
        "parallel": {"threads": 1},
        "training": {
            "run": str(folder / "run"),
            "micro_batch_sequences": 2,
            "global_batch_positions": 320,
            "budget_positions": 320 * 4,
        },
        "checkpoint": {"every_steps": 2},
        "evaluation": {"at_end": False},
        "monitoring": {"log_every_steps": 1, "tables_every_steps": 1, "sinks": [{"kind": "jsonl"}, {"kind": "arrays"}]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "config.yaml")


def mmoe(*command) -> None:
    app([str(part) for part in command], standalone_mode=False)


def losses(folder) -> list:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def expected(local, tmp_path_factory):
    """The losses of the run on the sources as they lie here."""
    folder = tmp_path_factory.mktemp("near")
    mmoe("train", config(str(local), folder))
    return losses(folder)


@pytest.fixture(params=["file", "s3", "https"])
def root(request, local, tmp_path, monkeypatch):
    """An address of the sources."""
    if request.param == "file":
        yield f"file://{local}"
    elif request.param == "s3":
        with moto_server() as endpoint:
            for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}).items():
                monkeypatch.setenv(name, value)
            yield upload(local, "bucket", endpoint)
    else:
        theirs, ours = certificate(tmp_path)
        monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": ours})
        with served(local, tls=theirs) as server:
            yield server.address


@contextmanager
def served(folder, **choices) -> Iterator[FaultyServer]:
    server = FaultyServer(**choices)
    server.files = {f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    try:
        yield server
    finally:
        server.close()


def test_a_run_trains_and_resumes_on_sources_elsewhere_as_on_those_here(root, expected, tmp_path):
    far = config(root, tmp_path)
    mmoe("train", far, "--stop-after", 2)
    mmoe("train", far)
    assert losses(tmp_path) == expected and len(expected) == 4
    assert root in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_every_command_reads_sources_elsewhere(root, tmp_path):
    far, run = config(root, tmp_path), tmp_path / "run"
    mmoe("train", far)
    mmoe("inspect", far, "--steps", 2)
    mmoe("stages", far)
    mmoe("evaluate", run)
    mmoe("evaluate", run, "--shards", f"{root}/clip")
    mmoe("report", run)
    mmoe("generate", run, "--prompt", "so", "--max-tokens", 2)
    mmoe("export", run, "--out", tmp_path / "exported")
    assert (run / "report.html").is_file() and (run / "evaluation.json").is_file()
    assert (run / "evaluation-on-clip.json").is_file() and (tmp_path / "exported" / "config.json").is_file()


def test_a_source_far_away_is_never_made_and_its_absence_is_said(local, tmp_path):
    with served(local) as server:
        assert is_prepared(f"{server.address}/clip") and not is_prepared(f"{server.address}/clap")
        assert is_prepared(local / "clip") and is_prepared(f"file://{local}/clip") and not is_prepared(tmp_path)
        del server.files["/bytes.json"]
        with pytest.raises(DataError, match="bytes.json does not exist: tokenizers.text.path"):
            mmoe("train", config(server.address, tmp_path))
        del server.files["/clip/source.json"]
        with pytest.raises(DataError, match=re.escape(f"{server.address}/clip/source.json does not exist")):
            mmoe("train", config(server.address, tmp_path))
    assert not (tmp_path / "run").exists()
