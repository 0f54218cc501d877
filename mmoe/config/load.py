"""Turns YAML with one parent and dotted overrides into the validated tree, or a sentence for every fault."""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmoe.addresses import without_secrets
from mmoe.config.base import Config, change_addresses
from mmoe.config.reader import MOST_BYTES, MOST_DEPTH, Dumper, read_yaml
from mmoe.errors import ConfigError, brief, did_you_mean

C = TypeVar("C", bound=Config)

MOST_FAULTS = 20  # that are told at once
_HINTS = {
    "bool_type": "write true or false",
    "int_type": "write it in plain decimal digits, without quotes",
    "float_type": "write it in plain decimal digits, without quotes",
    "finite_number": "use null where the key takes it and no limit is meant",
}


def read_layers(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the mapping of a YAML file's parent (`extends`, relative to it; empty without one), and the file's own."""
    path = Path(path)
    own = _read(path)
    parent = own.pop("extends", None)
    if parent is None:
        return {}, own
    if not isinstance(parent, str) or not parent:
        raise ConfigError(f"{path}: extends is {brief(parent)}; give the path of one YAML file, relative to this one")
    base = path.parent / parent
    try:
        below = _read(base)
    except FileNotFoundError:
        raise ConfigError(f"{path}: extends names {parent}, but {base} does not exist") from None
    if "extends" in below:
        raise ConfigError(f"{path}: extends names {parent}, which extends another file; only one parent is allowed")
    return below, own


def _read(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where there is nothing."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{path} is a folder; give a YAML file in it, or the folder of a run (with config.yaml)")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            raise ConfigError(f"{path} is a pipe or a device; give the path of a YAML file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{brief(str(path), quoted=False)} cannot be read ({reason}); give a YAML file") from None
    data = read_yaml(content, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{path} must hold a mapping of keys such as `data:` and `model:`, not {found}")
    return data


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay `changes` over `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def rename_keys(tree: dict[str, Any], names: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Give the keys of mappings in mappings other names: `names` holds the new name of a key by its dotted place."""
    return {
        names.get(f"{prefix}{key}", key): rename_keys(value, names, f"{prefix}{key}.")
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Put dotted keys in place of mappings in mappings; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse ``["optim.lr.peak=1e-3"]`` to ``{"optim": {"lr": {"peak": 0.001}}}``; values are read as YAML."""
    tree: dict[str, Any] = {}
    for item in overrides:
        where = f"override {brief(item)}"
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise ConfigError(f"{where} is not UTF-8; give plain text")
        key, separator, text = item.partition("=")
        parts = key.split(".")
        if not separator or not all(parts) or key != "".join(key.split()):
            raise ConfigError(f"{where} is not of the form key.path=value, e.g. optim.lr.peak=1e-3")
        if len(parts) > MOST_DEPTH:
            raise ConfigError(f"{where} names a key {len(parts)} levels deep; none is deeper than {MOST_DEPTH}")
        value = read_yaml(text, where)
        for part in reversed(parts):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def load(
    kind: type[C],
    path: str | Path,
    overrides: Sequence[str] | None = None,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> C:
    """Read the tree of `kind` from a YAML file, with `overrides`; raises `ConfigError` naming every bad key.

    `upgrade` turns what the file holds, where an earlier version may have written it, into the tree of today.
    """
    try:
        parent, own = map(upgrade, read_layers(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file such as configs/demo.yaml") from None
    tree = merge(parent, own)
    given = parse_overrides(overrides or [])
    for below, above in ((parent, own), (tree, given)):
        try:
            kind.check_layer(below, above)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    return validate(kind, merge(tree, given), str(path), Path(path).parent)


def override(config: C, overrides: Sequence[str]) -> C:
    """Give the config with dotted overrides applied. Raises ConfigError naming every bad key."""
    given = parse_overrides(overrides)
    return validate(type(config), merge(config.model_dump(mode="json"), given), "overrides") if given else config


def validate(kind: type[C], tree: dict[str, Any], where: str, folder: Path | None = None) -> C:
    """Validate a plain mapping as `kind`; `where` names the file in messages, `folder` has extensions beside it."""
    try:
        return kind.model_validate_json(json.dumps(tree), context={"folder": folder})
    except ValidationError as error:
        lines = [f"{where}: {sentence}" for sentence in sentences(kind, tree, error)]
        more = [f"{where}: {len(lines) - MOST_FAULTS} more faults"] if len(lines) > MOST_FAULTS else []
        raise ConfigError("\n".join(lines[:MOST_FAULTS] + more)) from None


def sentences(kind: type[BaseModel], tree: Any, error: ValidationError) -> list[str]:
    """Say each fault that pydantic found in `tree` once, with its key and, where there is one, a remedy."""
    return list(dict.fromkeys(_sentence(kind, tree, item) for item in error.errors()))


def dump(config: Config) -> str:
    """Write the resolved tree as YAML that `load` reads again. Raises ConfigError where it would be too long to."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if len(text) > MOST_BYTES:
        raise ConfigError(f"the config, written out, is longer than {MOST_BYTES:,} bytes; name fewer sources")
    return text


def absolute(config: C, folder: str | Path | None = None) -> C:
    """Give the config with addresses that hold from any folder; relative ones are taken from `folder`.

    Without a folder they are taken from the current one. URLs stay as they are.
    """
    return change_addresses(config, partial(_absolute, os.fspath(folder or Path.cwd())))


def _absolute(folder: str, address: str) -> str:
    far = "://" in address or address.startswith("pipe:")
    return address if far else os.path.normpath(Path(folder, address).absolute())


def _sentence(root: type[BaseModel], tree: Any, item: ErrorDetails) -> str:
    location = _keys(tree, item["loc"], item["type"] == "missing")
    key = brief(".".join(location), 200, quoted=False) or "the config"
    if item["type"] == "extra_forbidden":
        prefix = "".join(f"{part}." for part in location[:-1])
        return f"{key} is not a known key{did_you_mean(location[-1], _fields_at(root, location[:-1]), prefix)}"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}"
    hint = f"; {_HINTS[item['type']]}" if item["type"] in _HINTS else ""
    return without_secrets(f"{key}: {message[0].lower()}{message[1:]}, got {brief(item['input'])}{hint}")


def _keys(tree: Any, location: Sequence[str | int], missing: bool) -> list[str]:
    """The keys of a fault's location; what else stands in it are branches of a union of types."""
    keys = []
    for number, part in enumerate(location):
        if isinstance(tree, dict) and (part in tree or (missing and number == len(location) - 1)):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            continue
        keys.append(str(part))
    return keys


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return [] if annotation is None else list(model.model_fields)
        model = nested[0]
    return list(model.model_fields)
