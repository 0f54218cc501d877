"""Byte-level BPE: lossless, deterministic, recognizable."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
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
@example("e\u0301 \u00e9 \ufb01 \u212b \U0001f468\u200d\U0001f469")  # normalization would change each of these
@example("<|endoftext|> [UNK] </s>")
@settings(max_examples=300)
def test_any_text_round_trips(text):
    for tokenizer in (BYTES, TRAINED):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ((ids >= 0) & (ids < tokenizer.size)).all()
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
        ({"normalizer": {"type": "NFC"}}, "normalizes"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not work on bytes"),
        ({"pre_tokenizer": None}, "does not work on bytes"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "prefix space"),
        ({"decoder": None}, "comes back as"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "255 of the 256 bytes"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
    ],
)
def test_lossy_tokenizers_are_refused(tmp_path, change, reason):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(json.loads(_saved(tmp_path, BYTES)) | change))
    with pytest.raises(DataError, match=reason):
        TextTokenizer.load(path)


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PREFIX = pre_tokenizers.ByteLevel(add_prefix_space=True)
Chain = pre_tokenizers.Sequence
LOSSY = {
    "whitespace": Chain([pre_tokenizers.Whitespace(), LEVEL]),
    "whitespace_split": Chain([pre_tokenizers.WhitespaceSplit(), LEVEL]),
    "metaspace": Chain([pre_tokenizers.Metaspace(), LEVEL]),
    "metaspace_without_prefix": Chain([pre_tokenizers.Metaspace(prepend_scheme="never"), LEVEL]),
    "scripts": Chain([pre_tokenizers.UnicodeScripts(), LEVEL]),  # a text of a space alone
    "bert": Chain([pre_tokenizers.BertPreTokenizer(), LEVEL]),
    "delimiter": Chain([pre_tokenizers.CharDelimiterSplit("☃"), LEVEL]),
    "delimiter_space": Chain([pre_tokenizers.CharDelimiterSplit(" "), LEVEL]),
    "delimiter_behind": Chain([LEVEL, pre_tokenizers.CharDelimiterSplit("Ġ")]),
    "punctuation_removed": Chain([pre_tokenizers.Punctuation("removed"), LEVEL]),
    "punctuation_removed_behind": Chain([LEVEL, pre_tokenizers.Punctuation("removed")]),
    "split_removed": Chain([pre_tokenizers.Split(Regex("x"), "removed"), LEVEL]),
    "nested": Chain([Chain([Chain([pre_tokenizers.WhitespaceSplit()]), LEVEL])]),
    "nested_prefix": Chain([Chain([pre_tokenizers.Digits()]), Chain([PREFIX])]),
    "twice": Chain([LEVEL, LEVEL]),
    "prefix_at_every_split": Chain([pre_tokenizers.Split(Regex("x"), "isolated"), PREFIX]),
}
LOSSLESS = {
    "level": LEVEL,
    "level_without_regex": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "level_with_untrimmed_offsets": pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
    "digits": Chain([pre_tokenizers.Digits(individual_digits=True), LEVEL]),
    "punctuation": Chain([pre_tokenizers.Punctuation("isolated"), LEVEL]),
    "split": Chain([pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+"), "isolated"), LEVEL]),
    "metaspace_behind": Chain([LEVEL, pre_tokenizers.Metaspace()]),
    "whitespace_behind": Chain([LEVEL, pre_tokenizers.Whitespace()]),  # bytes are no white space
    "nested": Chain([Chain([pre_tokenizers.Digits()]), Chain([Chain([LEVEL])])]),
}


def _with(folder, **parts):
    tokenizer = Tokenizer.from_str(_saved(folder, TRAINED))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(folder / "other.json"))
    return folder / "other.json"


@pytest.mark.parametrize("name", LOSSY)
def test_pre_tokenizers_that_lose_text_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"other.json would lose text: (.* comes back as|it (removes|adds))"):
        TextTokenizer.load(_with(tmp_path, pre_tokenizer=LOSSY[name]))


@pytest.mark.parametrize("name", LOSSLESS)
def test_pre_tokenizers_that_lose_nothing_are_taken(tmp_path, name):
    loaded = TextTokenizer.load(_with(tmp_path, pre_tokenizer=LOSSLESS[name]))
    for text in (*CORPUS, " a  b\r\n\tc 12.5 ☃ 漢字 🙂"):
        assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Fuse(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("☃ man", "snowman")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.CTC("<pad>")]),
    ],
    ids=["word_piece", "metaspace", "fuse", "strip", "replace", "replace_rare", "ctc"],
)
def test_decoders_that_lose_text_are_refused(tmp_path, decoder):
    with pytest.raises(DataError, match="other.json would lose text: .* comes back as"):
        TextTokenizer.load(_with(tmp_path, decoder=decoder))


def test_decoders_and_post_processors_that_lose_nothing_are_taken(tmp_path):
    parts = {
        "decoder": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        "post_processor": processors.RobertaProcessing(("b", 1), ("a", 2), trim_offsets=True, add_prefix_space=True),
    }
    assert TextTokenizer.load(_with(tmp_path, **parts)).encode(" a").tolist() == TRAINED.encode(" a").tolist()


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
