"""YAML with one parent and dotted overrides -> the validated tree, and a sentence for every fault on the way."""

import difflib
import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mmoe.config.base import Config
from mmoe.errors import ConfigError

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """`safe_load` that also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3 and silently gives a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_layers(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping of a YAML file's parent (`extends`, relative to it; empty without one), and the file's own."""
    path = Path(path)
    own = _read(path)
    parent = own.pop("extends", None)
    if parent is None:
        return {}, own
    base = path.parent / parent
    if not base.is_file():
        raise ConfigError(f"{path}: extends names {parent}, but {base} does not exist")
    below = _read(base)
    if "extends" in below:
        raise ConfigError(f"{path}: extends names {parent}, which extends another file; only one parent is allowed")
    return below, own


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file such as configs/demo.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys such as `data:` and `model:`, not {type(data).__name__}")
    return data


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys in place of mappings in mappings; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """``["optim.lr.peak=1e-3"]`` -> ``{"optim": {"lr": {"peak": 0.001}}}``; values are read as YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {item!r} is not of the form key.path=value, e.g. optim.lr.peak=1e-3")
        value = yaml.load(text, Loader=_Loader)
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def load(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """The tree of `kind` in a YAML file with `overrides` applied; raises `ConfigError` naming every bad key."""
    parent, own = read_layers(path)
    tree = merge(parent, own)
    given = parse_overrides(overrides or [])
    for below, above in ((parent, own), (tree, given)):
        try:
            kind.check_layer(below, above)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    return validate(kind, merge(tree, given), str(path))


def validate(kind: type[C], tree: dict[str, Any], where: str) -> C:
    """Validate a plain mapping as `kind`; `where` names the file in messages."""
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [f"{where}: {_sentence(kind, item)}" for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump(config: Config) -> str:
    """YAML of the resolved tree; `load` gives back an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _sentence(root: type[BaseModel], item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "the config"
    if item["type"] == "extra_forbidden":
        known = _fields_at(root, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"{key} is not a known key{hint}"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return [] if annotation is None else list(model.model_fields)
        model = nested[0]
    return list(model.model_fields)
