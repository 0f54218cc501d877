"""Writes a config with what each of its keys means, from the comments that stand beside the fields in the source."""

import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from mmoe.config.base import Config
from mmoe.config.reader import Dumper

_COLUMN = 44  # where comments begin, unless the value is longer


def described(config: Config) -> str:
    """Write the tree as YAML that `load` reads again, with a comment on every key: its meaning, and its default.

    The default is left out where the value is it.
    """
    return "".join(f"{line}\n" for line in _mapping(config, ""))


def meaning(kind: type[Config], name: str) -> str:
    """Return the comment on a field in the source of its class, in one line: behind it, or above it; "" without one."""
    for declared in kind.__mro__:
        if name in inspect.get_annotations(declared):
            return _comments(declared).get(name, "")
    return ""


@dataclass(frozen=True)
class Option:
    """Describes a key of a config: its dotted name, its default as YAML (None: it must be given), and its meaning."""

    name: str
    default: str | None
    meaning: str


def options(of: Config | type[Config], prefix: str = "") -> Iterator[Option]:
    """Describe every key of a config, and of those inside it; the values of an object stand in place of defaults."""
    kind = of if isinstance(of, type) else type(of)
    for name, field in kind.model_fields.items():
        required = of is kind and field.is_required()
        value = field.get_default(call_default_factory=True) if isinstance(of, type) else getattr(of, name)
        if isinstance(value, Config):
            yield from options(value, f"{prefix}{name}.")
        else:
            choices = "|".join(map(str, _choices(field.annotation)))
            said = f"{meaning(kind, name)} [{choices}]" if choices else meaning(kind, name)
            yield Option(f"{prefix}{name}", None if required else inline(value), said)


def _choices(annotation: Any) -> Iterator[Any]:
    """The values that a key may have by name."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for each in get_args(annotation):
            yield from _choices(each)


@cache
def _comments(kind: type) -> dict[str, str]:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline))
    except (OSError, TypeError, tokenize.TokenError):  # a class that was made without a file
        return {}
    found: dict[str, str] = {}
    above: list[str] = []  # comments since the last statement, on lines of their own
    name: str | None = None  # that the statement begins with
    begins = True  # the next token a statement
    for token in tokens:
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if begins:
                above.append(text)
            elif name is not None:
                found[name] = f"{found[name]} {text}".strip()
        elif token.type == tokenize.NEWLINE:
            begins = True
        elif begins and token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            begins, name = False, token.string if token.type == tokenize.NAME else None
            if name is not None:
                found[name] = " ".join(above)
            above = []
    return {name: text for name, text in found.items() if text}


def _mapping(node: Config | Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in _items(node):
        comment = _comment(node, name, value) if isinstance(node, Config) else ""
        key = inline(name)
        if isinstance(value, Config) or (
            isinstance(value, Mapping) and any(isinstance(v, Config) for v in value.values())
        ):
            yield _line(f"{indent}{key}:", comment)
            yield from _mapping(value, f"{indent}  ")
        else:
            yield _line(f"{indent}{key}: {inline(value)}", comment)


def _items(node: Config | Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = type(node).model_fields if isinstance(node, Config) else node
    return [(name, getattr(node, name) if isinstance(node, Config) else node[name]) for name in names]


def _comment(node: Config, name: str, value: Any) -> str:
    said = [meaning(type(node), name)]
    if isinstance(value, Config) and not said[0]:
        said = [(type(value).__doc__ or "").partition("\n")[0].rstrip(".")]
    field = type(node).model_fields[name]
    if not field.is_required() and not isinstance(value, Config):
        default = field.get_default(call_default_factory=True)
        if default != value:
            said.append(f"default {inline(default)}")
    return "; ".join(text for text in said if text)


def inline(value: Any) -> str:
    """Write a value as YAML on one line, as `load` reads it again."""
    plain = _plain(value)
    text = yaml.dump(plain, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COLUMN}}  # {comment}" if comment else text
