"""Secrets in addresses are refused wherever an address is given, and printed nowhere."""

import pytest

from mmoe.addresses import check_address, without_secrets
from mmoe.commands.main import main
from mmoe.config.load import validate
from mmoe.data.config import DataConfig
from mmoe.data.storage.store import Storage
from mmoe.errors import MmoeError
from mmoe.preparation.prepare import prepare
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.text import TextTokenizer

BAD = [
    "https://user:hunter2@host/folder",
    "https://hunter2@host/folder",
    "s3://key:hunter2@bucket/folder",
    "s3://key:hunt/hunter2@bucket/folder",
    "https:/user:hunter2@host/folder",  # as a path makes of it
    "https://host/folder?X-Amz-Signature=hunter2",
    "https://host/folder?a=b&sig=hunter2&c=d",
    "https://host/folder?access_token=hunter2#x",
    "ftp://user:hunter2@host/folder",
]
GOOD = ["s3://bucket/folder", "https://host:8080/a?version=3", "sftp://user@host/a", "/a/b", "b", "file:///a@b:c/d",
        "s3://bucket/12:00@x", "gs://bucket/a=b"]  # fmt: skip


@pytest.mark.parametrize("address", BAD)
def test_a_secret_is_refused_and_not_printed_wherever_an_address_is_taken(address, tmp_path, capsys, monkeypatch):
    sources = {"a": {"kind": "text", "shards": address}}
    calls = [
        lambda: check_address(address),
        lambda: validate(DataConfig, {"sources": sources, "sequence_length": 64}, "config"),
        # Wrong beside it, so that the whole node is quoted.
        lambda: validate(DataConfig, {"sources": {"a": {"shards": address}}, "sequence_length": 64}, "config"),
        lambda: validate(TokenizersConfig, {"text": {"path": address}}, "config"),
        lambda: validate(TokenizersConfig, {"audio": {"path": address}}, "config"),
        lambda: prepare("text", address, tmp_path / "out", text_tokenizer=TextTokenizer.bytes()),
        lambda: prepare("text", tmp_path, address, text_tokenizer=TextTokenizer.bytes()),
        lambda: prepare(
            "text",
            tmp_path,
            tmp_path / "out",
            text_tokenizer=TextTokenizer.bytes(),
            options={"prepare": {"dedup": {"against": [address]}}},
        ),
    ]
    if "://" in address:
        calls += [lambda: Storage().read(address), lambda: SourceManifest.load(address, Storage().read)]
    for call in calls:
        with pytest.raises(MmoeError) as caught:
            call()
        assert "hunter2" not in str(caught.value)
    command = ["mmoe", "clock-report", address]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        main()
    assert "hunter2" not in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", GOOD)
def test_an_address_without_a_secret_is_taken_as_it_is(address):
    check_address(address)
    assert without_secrets(f"so {address}, cannot be read") == f"so {address}, cannot be read"
