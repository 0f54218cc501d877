"""Reads YAML as configs and overrides are written in: plain values only, bounded before anything is expanded.

What is read is the YAML that people agree on. A plain word is true, false, null, a decimal number, or text: `on`,
`no`, `012`, `1:30` and dates, which YAML 1.1 turns into something else, stay text, so that a key which wants a
number says so. Keys are text, each stands once in its mapping. Anchors, aliases and merge keys (`<<`) work.

The bounds are constants and no part of the config, since a config cannot say how far it is to be read.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from mmoe.errors import ConfigError, brief

MOST_BYTES = 1 << 19  # of a file or an override
MOST_CHARACTERS = 1 << 20  # with aliases written out; every value counts one more than its length
MOST_DEPTH = 32  # mappings and lists inside each other, with aliases written out
MOST_INTEGER = 2**63 - 1

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}
_MERGE = "<<"
_STRING_TAGS = ("tag:yaml.org,2002:str", "!")


class Dumper(yaml.SafeDumper):
    """Writes YAML as `safe_dump` does, with text in quotes where `read_yaml` would take it for a number."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))


def read_yaml(text: str | bytes, where: str) -> Any:
    """Read one YAML document; None where it is empty.

    `where` names the file or the override in the ConfigError that every fault ends in.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{where} is longer than {MOST_BYTES:,} bytes, too long for a config; make it shorter")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save it as that") from None
    builder = _Builder(where)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.add(event)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # it raises the latter two for odd escapes
        said = brief(" ".join(str(error).split()), 300, quoted=False)
        raise ConfigError(f"{where} is not valid YAML: {said}") from None
    return builder.document


@dataclass
class _Node:
    """A value, its size in characters and its height in levels, both with aliases written out; `open` while read."""

    value: Any
    characters: int = 1
    height: int = 0
    open: bool = False


@dataclass
class _Collection(_Node):
    """A list or mapping that is being read."""

    key: str | None = None  # of a mapping: whose value comes next
    merging: bool = False  # the next value is that of a merge key
    lines: dict[str, int] = field(default_factory=dict)  # of a mapping's keys
    merged: list[dict[str, Any]] = field(default_factory=list)


class _Builder:
    """Makes values of parser events without recursion."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.document: Any = None
        self._documents = 0
        self._stack: list[_Collection] = []
        self._anchors: dict[str, _Node] = {}
        self._characters = 0

    def add(self, event: yaml.Event) -> None:
        """Take the next event. Raises ConfigError."""
        line = event.start_mark.line + 1
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._refuse(line, "a second document begins; a config is one, so remove the line ---")
            case yaml.ScalarEvent():
                self._grow(len(event.value) + 1, line)
                node = _Node(self._scalar(event, line), len(event.value) + 1)
                self._remember(event.anchor, node)
                self._put(node, line, merge_key=event.implicit[0] and event.value == _MERGE)
            case yaml.AliasEvent():
                known = self._anchors.get(event.anchor)
                if known is None:
                    self._refuse(line, f"the alias *{brief(event.anchor, quoted=False)} has no anchor before it")
                if known.open:
                    self._refuse(line, f"the alias *{brief(event.anchor, quoted=False)} stands inside its own anchor")
                self._grow(known.characters, line)
                self._put(known, line)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._check_tag(event, line)
                self._grow(1, line)
                begun = _Collection([] if isinstance(event, yaml.SequenceStartEvent) else {}, open=True)
                self._remember(event.anchor, begun)
                self._stack.append(begun)
                self._check_depth(len(self._stack), line)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                ended = self._stack.pop()
                ended.open = False
                ended.height += 1
                for below in ended.merged:
                    ended.value = below | ended.value
                self._put(ended, line)

    def _put(self, node: _Node, line: int, merge_key: bool = False) -> None:
        if not self._stack:
            self.document = node.value
            return
        parent = self._stack[-1]
        self._check_depth(len(self._stack) + node.height, line)
        parent.characters += node.characters
        parent.height = max(parent.height, node.height)
        if isinstance(parent.value, list):
            parent.value.append(node.value)
        elif parent.merging:
            below = node.value if isinstance(node.value, list) else [node.value]
            if not all(isinstance(each, dict) for each in below):
                self._refuse(line, "the merge key << takes a mapping or a list of them, such as *name")
            parent.merged += below
            parent.merging = False
        elif parent.key is not None:
            parent.value[parent.key] = node.value
            parent.key = None
        elif merge_key:
            parent.merging = True
        else:
            parent.key = self._key(node.value, parent, line)

    def _key(self, key: Any, parent: _Collection, line: int) -> str:
        if not isinstance(key, str):
            kind = "a list" if isinstance(key, list) else "a mapping" if isinstance(key, dict) else "no text"
            self._refuse(line, f"the key {brief(key)} is {kind}; put it in quotes if it is meant as a name")
        if key in parent.lines:
            self._refuse(line, f"the key {brief(key)} stands a second time, first in line {parent.lines[key]}")
        parent.lines[key] = line
        return key

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Any:
        value = event.value
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            self._refuse(line, f"{brief(value)} holds a NUL or half a character; give plain text")
        if event.tag is not None and event.tag not in _STRING_TAGS:
            self._check_tag(event, line)
        if event.tag is not None or not event.implicit[0]:
            return value
        if value in _WORDS:
            return _WORDS[value]
        if _INT.fullmatch(value):
            digits = value.replace("_", "")
            if len(digits) > 20 or abs(int(digits)) > MOST_INTEGER:
                self._refuse(line, f"the number {brief(value, quoted=False)} does not fit 64 bits; give a smaller one")
            return int(digits)
        if _FLOAT.fullmatch(value) or _NOT_FINITE.fullmatch(value):
            return float(value.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        return value

    def _check_tag(self, event: yaml.NodeEvent, line: int) -> None:
        if event.tag is not None:
            tag = brief(event.tag.replace("tag:yaml.org,2002:", "!!"), quoted=False)
            self._refuse(line, f"the tag {tag} is not read; write the value plainly")

    def _remember(self, anchor: str | None, node: _Node) -> None:
        if anchor is not None:
            self._anchors[anchor] = node

    def _grow(self, characters: int, line: int) -> None:
        self._characters += characters
        if self._characters > MOST_CHARACTERS:
            self._refuse(line, f"with its aliases it holds more than {MOST_CHARACTERS:,} characters; use fewer")

    def _check_depth(self, depth: int, line: int) -> None:
        if depth > MOST_DEPTH:
            self._refuse(line, f"mappings and lists are nested more than {MOST_DEPTH} deep; nest them less")

    def _refuse(self, line: int, fault: str) -> NoReturn:
        raise ConfigError(f"{self.where}, line {line}: {fault}")
