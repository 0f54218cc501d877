"""Says of each field of a config what it is to a run that goes on: whether it may be another than it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from mmoe.config.registry import KindConfig
from mmoe.errors import brief


class Nature(Enum):
    """Says what a change of a field is to a run that has steps already; the first ones weigh most.

    A field declares it beside itself, ``workers: Annotated[int, Nature.OPERATIONAL] = 0``, or a class for all its
    fields, ``nature: ClassVar[Nature] = Nature.LAYOUT``. The nearest declaration holds: that of the field, of its
    class, of the field that holds its class, and so on. Where there is none a field is IDENTITY.
    """

    IDENTITY = "identity"  # what the run is: a change is refused
    ADJUSTABLE = "adjustable"  # identity too, but a change that is asked for and recorded (`--set`) is taken
    EXTENDABLE = "extendable"  # how far the run goes: may change where what is done stays true
    LAYOUT = "layout"  # where, and in which pieces, the same numbers are computed: may change, they round otherwise
    OPERATIONAL = "operational"  # decides no number: may change


WEIGHT = list(Nature)


@dataclass(frozen=True)
class Difference:
    """Names a key of which two configs have different values, with both as plain values of JSON."""

    key: str
    nature: Nature
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} ({_said(self.before)} -> {_said(self.now)})"


def natures(config: BaseModel) -> dict[str, Nature]:
    """Give the nature of every value of a config by its dotted key, in order.

    Keys are those of `mmoe.config.load.flatten`; parts of a list have their number, or their label if they have a kind.
    """
    return dict(_leaves("", Nature.IDENTITY, config))


def differences(before: BaseModel, now: BaseModel) -> list[Difference]:
    """List what differs between two configs of one class; a part that only one of them has is named as a whole.

    The order of parts with a name, such as sources, is a difference too: it numbers them.
    """
    return list(_compare("", Nature.IDENTITY, before, now))


def _compare(key: str, nature: Nature, before: Any, now: Any) -> Iterator[Difference]:
    old, new = _parts(before, nature), _parts(now, nature)
    if old and type(before) is type(now) and (old.keys() == new.keys()) and not _reordered(before, now):
        for name, (part_nature, part) in old.items():
            yield from _compare(f"{key}.{name}" if key else name, part_nature, part, new[name][1])
    elif before != now or _reordered(before, now):
        both = [of for value in (before, now) for _, of in _leaves(key, nature, value)]
        yield Difference(key, min(both, key=WEIGHT.index), to_jsonable_python(before), to_jsonable_python(now))


def _leaves(key: str, nature: Nature, value: Any) -> Iterator[tuple[str, Nature]]:
    parts = _parts(value, nature)
    if not parts:
        yield key, nature
    for name, (part_nature, part) in parts.items():
        yield from _leaves(f"{key}.{name}" if key else name, part_nature, part)


def _parts(value: Any, nature: Nature) -> dict[str, tuple[Nature, Any]]:
    """The parts of a value with a key of their own; `nature` is that of the field which holds it."""
    if isinstance(value, BaseModel):
        nature = getattr(value, "nature", nature)
        return {
            name: (_of_field(field, nature), getattr(value, name)) for name, field in type(value).model_fields.items()
        }
    if isinstance(value, dict):
        return {str(name): (nature, part) for name, part in value.items()}
    if isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
        labels = [part.label if isinstance(part, KindConfig) else str(number) for number, part in enumerate(value)]
        return {label: (nature, part) for label, part in zip(labels, value, strict=True)}
    return {}


def _of_field(field: FieldInfo, nature: Nature) -> Nature:
    """That of a field in a config of this `nature`; one that is null may have its class's, too."""
    if declared := [mark for mark in field.metadata if isinstance(mark, Nature)]:
        return declared[0]
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind.nature for kind in kinds if issubclass(kind, BaseModel) and hasattr(kind, "nature")), nature)


def _reordered(before: Any, now: Any) -> bool:
    """Whether two mappings name configs in different orders."""
    both = isinstance(before, dict) and isinstance(now, dict)
    return both and list(before) != list(now) and any(isinstance(part, BaseModel) for part in before.values())


def _said(value: Any) -> str:
    """A value for a sentence; of parts with names, the names."""
    named = isinstance(value, dict) and any(isinstance(part, dict) for part in value.values())
    return brief(", ".join(value) if named else value, quoted=False)
