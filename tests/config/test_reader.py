"""The YAML of configs: plain values, bounded before anything is expanded, and a sentence for all else."""

import math
import os
import tracemalloc

import pytest

from mmoe.config.base import Config
from mmoe.config.load import dump, load
from mmoe.config.reader import MOST_BYTES, MOST_CHARACTERS, MOST_DEPTH, read_yaml
from mmoe.errors import ConfigError


def bomb(levels: int, width: int) -> str:
    """Each line holds `width` aliases of the line before."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_anchors_aliases_and_merge_keys_of_an_ordinary_recipe_are_read():
    text = (
        "common: &c {kind: text, max: 1}\nsources:\n  a: {<<: *c, max: 2}\n  b: {max: 3, <<: [*c, {min: 0}]}\n  c: *c\n"
    )
    common = {"kind": "text", "max": 1}
    assert read_yaml(text, "recipe") == {
        "common": common,
        "sources": {"a": common | {"max": 2}, "b": common | {"max": 3, "min": 0}, "c": common},
    }
    assert read_yaml('"<<": 1', "recipe") == {"<<": 1}
    assert read_yaml("", "recipe") is None and read_yaml("a:", "recipe") == {"a": None}


@pytest.mark.parametrize(
    "word, value",
    [
        *(
            (word, word)
            for word in ("on", "off", "yes", "no", "y", "012", "0x10", "1:30", "2020-01-01", "1.2.3", "_1", "=")
        ),
        *(("true", True), ("false", False), ("null", None), ("~", None)),
        *(("1_000", 1000), ("-5", -5), ("0", 0), ("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-1_0.5E+2", -1050.0)),
        (".inf", math.inf),
        *((f"'{word}'", word) for word in ("1", "true", "1e-3")),
        ("!!str 1", "1"),
    ],
)
def test_a_word_means_what_people_agree_on(word, value):
    """YAML 1.1 makes false of `no`, 10 of `012` and 90 of `1:30`; here they stay text, and `dump` gives them back."""
    found = read_yaml(f"a: {word}", "recipe")["a"]
    assert found == value and type(found) is type(value)


class Named(Config):
    name: str


@pytest.mark.parametrize(
    "name", ["1e5", "1E+5", "1e-3", "1_0", "012", "on", "null", "~", "<<", "=", ".5", "1.", " a", "a: b"]
)
def test_what_is_dumped_is_read_as_the_same_text(tmp_path, name):
    (tmp_path / "a.yaml").write_text(dump(Named(name=name)))
    assert load(Named, tmp_path / "a.yaml").name == name


def test_what_could_not_be_read_again_is_not_written():
    with pytest.raises(ConfigError, match="written out, is longer than"):
        dump(Named(name="x" * MOST_BYTES))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: 1\nb: {c: 1,\n  c: 2}", "line 3: the key 'c' stands a second time, first in line 2"),
        ("1: a", "line 1: the key 1 is no text; put it in quotes"),
        ("true: a", "the key True is no text"),
        ("? [a, b]\n: 1", r"the key \['a', 'b'\] is a list"),
        ("a: &x [1, *x]", r"the alias \*x stands inside its own anchor"),
        ("a: &x {b: *x}", r"the alias \*x stands inside its own anchor"),
        ("a: *x", r"the alias \*x has no anchor before it"),
        ("{<<: 1}", "the merge key << takes a mapping"),
        ("a: !!python/name:os.system x", r"the tag !!python/name:os.system is not read"),
        ("a: !!set {b}", "the tag !!set is not read"),
        ("a: !!binary aGk=", "the tag !!binary is not read"),
        ("a: 1\n---\nb: 1", "line 2: a second document begins"),
        ("a: " + "9" * 5000, "does not fit 64 bits"),
        ('a: "\\ud800"', "holds a NUL or half a character"),
        ('a: "\\0"', "holds a NUL or half a character"),
        ("a: \0", "is not valid YAML"),
        ("a: [" * (MOST_DEPTH + 1), f"nested more than {MOST_DEPTH} deep"),
        ("[" * 100_000, f"nested more than {MOST_DEPTH} deep"),
        ("- " * 10_000, f"nested more than {MOST_DEPTH} deep"),
        (bomb(50, 1), f"nested more than {MOST_DEPTH} deep"),
        ("#" * (MOST_BYTES + 1), "is longer than"),
        (b"a: \xff", "is not UTF-8"),
    ],
)
def test_every_fault_is_a_sentence_that_names_its_line(text, sentence):
    with pytest.raises(ConfigError, match=f"^recipe.*{sentence}") as caught:
        read_yaml(text, "recipe")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_what_aliases_expand_to_is_counted_before_it_is_made():
    """380 bytes that would be 22.8 GiB, and one long word many times over, are refused within a few MiB."""
    long = f"a: &a {'x' * (MOST_BYTES // 2)}\nb: [{', '.join(['*a'] * 100)}]"
    tracemalloc.start()
    try:
        for text in (bomb(10, 10), long):
            with pytest.raises(
                ConfigError, match=f"with its aliases it holds more than {MOST_CHARACTERS:,} characters"
            ):
                read_yaml(text, "recipe")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "empty", "binary", "list", "too long a name"])
def test_what_is_no_config_is_refused_and_never_waited_for(tmp_path, kind):
    path = tmp_path / "config.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "too long a name":
        path = tmp_path / ("x" * 300)
    else:
        path.write_bytes({"empty": b"", "binary": bytes(range(256)), "list": b"- 1\n"}[kind])
    said = {
        "folder": "is a folder; give a YAML file in it, or the folder of a run",
        "pipe": "is a pipe or a device",
        "device": "is a pipe or a device",
        "empty": "must hold a mapping .* not nothing",
        "binary": "is not UTF-8",
        "list": "must hold a mapping .* not list",
        "too long a name": "cannot be read",
    }
    with pytest.raises(ConfigError, match=said[kind]):
        load(Named, path)
