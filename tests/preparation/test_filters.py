"""Filters: each says what it should of texts made for it, and its share is what counting by hand gives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.config.load import validate
from mmoe.errors import ConfigError
from mmoe.preparation.filters import (
    FilterConfig,
    duplicate_line_share,
    find_fault,
    language,
    longest_digit_run,
    ngram_share,
    replacement_share,
)
from mmoe.preparation.prepare import prepare
from mmoe.tokenizers.text import TextTokenizer
from tests.data.recordings import images, png, write_captions, write_jsonl

ENGLISH = "The committee met on Tuesday to discuss the new bridge, and nobody agreed with anybody about its form. " * 2
GERMAN = "Der Ausschuss traf sich am Dienstag, um über die neue Brücke zu sprechen, und niemand war einer Meinung. " * 2


def filters(**text):
    return validate(FilterConfig, {"text": text}, "test")


def reason(config, text, sizes=()):
    fault = find_fault([text] if text else [], sizes, config)
    return fault and fault.reason


@given(st.text(), st.integers(0, 9))
def test_replacement_share_counts_characters(text, more):
    text = text.replace("\ufffd", "") + "\ufffd" * more
    assert replacement_share(text) == (more / len(text) if text else 0)


@given(st.lists(st.text("ab. ", min_size=1, max_size=4)), st.integers(1, 12))
def test_the_longest_run_of_digits_is_found_among_shorter_ones(words, length):
    text = "7".join(words) + "x" + "1" * length + "x" + "23"
    assert longest_digit_run(text) == max(length, 2)


@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=8, unique=True), st.integers(1, 4))
def test_duplicate_lines_are_those_after_the_first(lines, times):
    assert duplicate_line_share("\n".join(lines)) == 0
    assert duplicate_line_share("\n\n".join(lines * times)) == pytest.approx(1 - 1 / times)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=20), st.integers(1, 4))
def test_ngram_share_is_a_share_and_sees_through_case(words, n):
    text = " ".join(words)
    share = ngram_share(text, n)
    assert 0 <= share <= 1 and share == ngram_share(text.upper(), n)
    if len(set(words)) == 1 and len(words) > n:
        assert share == 1
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert (share == 0) == (len(grams) == len(set(grams)))


def test_ngrams_of_scripts_without_spaces_are_of_characters():
    assert ngram_share("吾輩は猫である。名前はまだ無い。", 3) == 0
    assert ngram_share("猫である猫である猫である犬", 4) == pytest.approx(12 / 13)
    assert ngram_share("buy it now or buy it later", 2) == pytest.approx(4 / 7)


def test_nothing_but_broken_text_is_removed_by_default():
    default = FilterConfig()
    assert reason(default, "x" * 10_000 + "0" * 99, [(1, 5000)]) is None
    assert reason(default, "caf\ufffd " * 3) == "replacement characters"
    assert reason(default, "a" * 99 + "\ufffd") is None  # 1 %
    assert reason(filters(replacement_share=None), "\ufffd" * 9) is None


def test_each_threshold_divides_what_it_should():
    assert (
        reason(filters(min_characters=5), "four") == "short text" and reason(filters(min_characters=4), "four") is None
    )
    assert (
        reason(filters(max_characters=3), "four") == "long text" and reason(filters(max_characters=4), "four") is None
    )
    assert (
        reason(filters(digit_run=3), "a 1234") == "long run of digits" and reason(filters(digit_run=4), "1234") is None
    )
    assert reason(filters(duplicate_lines=0.4), "a\nb\na\nb") == "repeated lines"
    assert reason(filters(duplicate_lines=0.5), "a\nb\na\nb") is None
    assert reason(filters(ngram=2, ngram_share=0.5), "buy it now or buy it later") == "repeated words"
    assert reason(filters(ngram=2, ngram_share=0.6), "buy it now or buy it later") is None
    sides = validate(FilterConfig, {"image": {"min_side": 32, "aspect": 3}}, "test")
    assert reason(sides, "", [(64, 64), (31, 40)]) == "small image"
    assert reason(sides, "", [(32, 97)]) == reason(sides, "", [(97, 32)]) == "extreme aspect ratio"
    assert reason(sides, "", [(32, 96), (96, 32)]) is None


def test_languages_are_told_of_long_texts_only():
    pytest.importorskip("py3langid")
    assert (language(ENGLISH), language(GERMAN)) == ("en", "de")
    english = filters(languages=["en"])
    english.check()
    assert reason(english, ENGLISH) is None and reason(english, "kurzer Satz") is None
    fault = find_fault([GERMAN], [], english)
    assert fault.reason == "language" and fault.said == "is in de, not in en"
    with pytest.raises(ConfigError, match="languages: .*english.*give ISO 639-1 codes such as en"):
        filters(languages=["english"]).check()
    assert language(GERMAN) == "de"  # the check leaves all languages possible


def test_what_is_filtered_is_listed_and_counted(tmp_path):
    texts = [f"A text of some length, number {i}, and no other." for i in range(12)]
    texts[2], texts[5] = "tiny", "broken \ufffd\ufffd\ufffd"
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    options = {"prepare": {"filters": {"text": {"min_characters": 10}}}}
    tokenizer = TextTokenizer.bytes()
    source, output = tmp_path / "a.jsonl", tmp_path / "out"
    made = prepare("text", source, output, text_tokenizer=tokenizer, options=options)
    manifest = made.manifest
    assert manifest.removed == {"replacement characters": 1, "short text": 1} and not manifest.quarantined
    assert sum(split.samples for split in manifest.splits.values()) == 10
    lines = [json.loads(line) for line in (output / "removed.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "key": "a-000002",
        "reason": "short text",
        "message": "sample a-000002 has 4 characters, fewer than 10",
    }
    assert lines[1]["key"] == "a-000005" and {"removed: short text": ["1"]}.items() <= made.summary.sections[-1].items()
    assert (output / "quarantine.jsonl").read_text() == ""


def test_images_are_filtered_by_size(tmp_path):
    write_captions(tmp_path / "in", 6)
    (tmp_path / "in/images/p3.png").write_bytes(png(images(1, 16, 64)[0]))
    options = {"prepare": {"filters": {"image": {"min_side": 32}}}}
    tokenizer = TextTokenizer.bytes()
    made = prepare("image_caption", tmp_path / "in", tmp_path / "out", text_tokenizer=tokenizer, options=options)
    assert made.manifest.removed == {"small image": 1}
