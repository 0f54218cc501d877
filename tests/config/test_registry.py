"""Parts that a config names by kind: found wherever they are offered, and every fault is a sentence."""

import datetime
from importlib.metadata import EntryPoint
from typing import Annotated

import pytest
from pydantic import AfterValidator, BeforeValidator, SerializeAsAny

from mmoe.config import registry
from mmoe.config.base import Config
from mmoe.config.load import dump, load, validate
from mmoe.config.registry import KindConfig, Registry, distinct
from mmoe.errors import ConfigError


class PartConfig(KindConfig):
    """Of any part."""


class OfferedConfig(PartConfig):
    """As an installed package has one."""

    size: int = 1


PARTS = Registry("part", "mmoe.test_parts", PartConfig, {"built": f"{__name__}:OfferedConfig", "gone": "mmoe.none:X"})


@PARTS.register("made")
class MadeConfig(PartConfig):
    """Registered by importing this module."""

    every: int
    pair: tuple[int, ...] = ()


class Root(Config):
    """Holds parts."""

    parts: Annotated[
        tuple[Annotated[SerializeAsAny[PartConfig], BeforeValidator(PARTS)], ...], AfterValidator(distinct)
    ] = ()


@pytest.fixture
def offered(monkeypatch):
    """Entry points of installed packages, one of which is broken."""
    points = [
        EntryPoint("theirs", f"{__name__}:OfferedConfig", "mmoe.test_parts"),
        EntryPoint("other", f"{__name__}:Root", "mmoe.test_parts"),
        EntryPoint("broken", f"{__name__}:Missing", "mmoe.test_parts"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])


def test_a_part_is_found_wherever_it_is_offered_and_reloads_to_an_equal_tree(offered, tmp_path):
    parts = [
        {"kind": "made", "every": 3, "pair": [1, 2]},
        {"kind": "theirs", "size": 2, "name": "second"},
        {"kind": "built"},
    ]
    root = validate(Root, {"parts": parts}, "test")
    assert [type(part) for part in root.parts] == [MadeConfig, OfferedConfig, OfferedConfig]
    assert [part.label for part in root.parts] == ["made", "second", "built"]
    (tmp_path / "root.yaml").write_text(dump(root))
    assert load(Root, tmp_path / "root.yaml") == root
    assert PARTS.kinds() == ["broken", "built", "gone", "made", "other", "theirs"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([{"kind": "mad"}], "'mad' is not a kind of part; did you mean made"),
        ([{"kind": "made", "every": 1, "evry": 2}], "evry is not a known key; did you mean every"),
        ([{"kind": "made"}], "every is missing"),
        ([{"kind": "made", "every": "x"}], "every: input should be a valid integer, got 'x'"),
        ([{"every": 1}], "give a mapping that says which part it is, e.g. .kind: broken"),
        ([3], "give a mapping"),
        ([{"kind": "theirs"}] * 2, "two are named theirs; give each a name of its own"),
        ([{"kind": "gone"}], "part gone is mmoe.none:X, which cannot be imported .No module named"),
        ([{"kind": "broken"}], "which cannot be imported .module .* has no attribute 'Missing'"),
        ([{"kind": "other"}], "test_registry:Root, part other, is no PartConfig"),
    ],
)
def test_every_fault_is_a_sentence(offered, parts, sentence):
    with pytest.raises(ConfigError, match=f"test: parts.*{sentence}"):
        validate(Root, {"parts": parts}, "test")


def test_what_json_cannot_hold_is_a_sentence_too():
    with pytest.raises(ValueError, match="it holds what JSON cannot"):
        Root(parts=({"kind": "made", "every": datetime.date(2026, 1, 1)},))


def test_a_kind_is_registered_once():
    with pytest.raises(ConfigError, match="there is a part of kind built already"):
        PARTS.register("built")(MadeConfig)
    with pytest.raises(ConfigError, match="there is a part of kind made already"):
        PARTS.register("made")(OfferedConfig)
    with pytest.raises(ConfigError, match="Root cannot be a part: derive it from PartConfig"):
        PARTS.register("root")(Root)
    assert PARTS.register("made")(MadeConfig) is MadeConfig  # a module that is imported twice
