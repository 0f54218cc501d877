"""Byte-level BPE: lossless, deterministic, recognisable."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmoe.errors import DataError
from mmoe.tokenizers.text import TextConfig, TextTokenizer, check_fingerprint

CORPUS = [
    "the cat sat on the mat\r\n",
    "the car turns left, then the car stops",
    "吾輩は猫である。名前はまだ無い。",
] * 8
BYTES = TextTokenizer.bytes()
TRAINED = TextTokenizer.train(CORPUS, 320)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # Cs: lone surrogates are no UTF-8


@given(any_text)
@example("\r\n\x00\x1f\x7f \t  leading, trailing and  double  spaces  ")
@example("e\u0301 \u00e9 \ufb01 \u212b \U0001f468\u200d\U0001f469")  # normalisation would change each of these
@example("<|endoftext|> [UNK] </s>")
@settings(max_examples=300)
def test_any_text_round_trips(text):
    for tokenizer in (BYTES, TRAINED):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ((0 <= ids) & (ids < tokenizer.size)).all()
        assert tokenizer.decode(ids) == text


@given(any_text)
def test_the_default_is_plain_utf8(text):
    assert BYTES.encode(text).tolist() == list(text.encode())
    assert BYTES.size == 256


@given(st.lists(any_text, max_size=5))
def test_a_batch_is_its_texts(texts):
    batch = TRAINED.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [TRAINED.encode(text).tolist() for text in texts]


def test_training_shortens_text_and_is_deterministic():
    text = CORPUS[0] + CORPUS[2]
    assert TRAINED.size <= 320
    assert len(TRAINED.encode(text)) < len(BYTES.encode(text)) / 2
    assert TextTokenizer.train(iter(CORPUS), 320).fingerprint == TRAINED.fingerprint
    with pytest.raises(ValueError, match="at least 256"):
        TextTokenizer.train(CORPUS, 255)


def test_saving_keeps_ids_and_fingerprint(tmp_path):
    TRAINED.save(tmp_path / "text.json")
    loaded = TextConfig(path=str(tmp_path / "text.json")).build()
    assert loaded.fingerprint == TRAINED.fingerprint and loaded.size == TRAINED.size
    assert all((loaded.encode(text) == TRAINED.encode(text)).all() for text in CORPUS)
    assert TextConfig().build().fingerprint == BYTES.fingerprint != TRAINED.fingerprint


def test_other_programs_read_the_file(tmp_path):
    path = str(tmp_path / "text.json")
    TRAINED.save(path)
    ids = TRAINED.encode(CORPUS[1]).tolist()
    assert Tokenizer.from_file(path).encode(CORPUS[1]).ids == ids
    assert PreTrainedTokenizerFast(tokenizer_file=path)(CORPUS[1])["input_ids"] == ids


def test_the_fingerprint_sees_every_merge(tmp_path):
    others = {TextTokenizer.train(CORPUS, size).fingerprint for size in (256, 257, 258, 320)}
    assert len(others) == 4 and BYTES.fingerprint in others  # 256 ids leave no room for a merge

    content = json.loads(_saved(tmp_path, TRAINED))
    merges, ids = content["model"]["merges"], content["model"]["vocab"]
    swapped_merges = content | {"model": content["model"] | {"merges": [merges[1], merges[0], *merges[2:]]}}
    swapped_ids = content | {"model": content["model"] | {"vocab": ids | {"a": ids["b"], "b": ids["a"]}}}
    for changed in (swapped_merges, swapped_ids):
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        assert TextTokenizer.load(tmp_path / "changed.json").fingerprint != TRAINED.fingerprint


def test_foreign_special_tokens_are_plain_text(tmp_path):
    content = Tokenizer.from_str(_saved(tmp_path, TRAINED))
    content.add_special_tokens(["<|end|>"])
    (tmp_path / "special.json").write_text(content.to_str())
    loaded = TextTokenizer.load(tmp_path / "special.json")
    assert loaded.size == TRAINED.size
    assert loaded.encode("a<|end|>b").tolist() == TRAINED.encode("a<|end|>b").tolist()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"normalizer": {"type": "NFC"}}, "normalises"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not work on bytes"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "prefix space"),
        ({"decoder": None}, "does not work on bytes"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "255 of the 256 bytes"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
    ],
)
def test_lossy_tokenizers_are_refused(tmp_path, change, reason):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(json.loads(_saved(tmp_path, BYTES)) | change))
    with pytest.raises(DataError, match=reason):
        TextTokenizer.load(path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"missing.json does not exist.*tokenizers.text.path"):
        TextConfig(path=str(tmp_path / "missing.json")).build()
    (tmp_path / "cut.json").write_text(_saved(tmp_path, TRAINED)[:500])
    with pytest.raises(DataError, match=r"cut.json is not a tokenizer"):
        TextTokenizer.load(tmp_path / "cut.json")
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer.load(tmp_path)


def test_config_rules(tmp_path):
    with pytest.raises(ValueError, match="without a path"):
        TextConfig(vocabulary_size=300)
    TRAINED.save(tmp_path / "text.json")
    with pytest.raises(DataError, match="more than tokenizers.text.vocabulary_size 257"):
        TextConfig(path=str(tmp_path / "text.json"), vocabulary_size=257).build()


def test_another_tokenizer_than_the_index_is_refused():
    check_fingerprint(TRAINED, TRAINED.fingerprint, "shards/books")
    with pytest.raises(DataError, match=r"shards/books holds text ids of another.*prepare.*tokenizers.text.path"):
        check_fingerprint(TRAINED, BYTES.fingerprint, "shards/books")


def test_decoding_cut_and_foreign_ids():
    assert BYTES.decode(BYTES.encode("é")[:1]) == "\ufffd"
    with pytest.raises(ValueError, match="vocabulary of 256"):
        BYTES.decode([1, 256])


@pytest.mark.real_data
def test_real_texts_round_trip(shared_data):
    for name in ("tinyshakespeare.txt", "wagahaiwa_nekodearu.ja.txt"):  # the second with CRLF line ends
        text = (shared_data / "text" / name).read_bytes().decode()[:200_000]
        tokenizer = TextTokenizer.train([text], 1024)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < 0.5 * len(text.encode())


def _saved(folder, tokenizer):
    tokenizer.save(folder / "saved.json")
    return (folder / "saved.json").read_text()
