"""Parts that a config names by `kind`: built in, registered by a decorator, or offered by an installed package."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import Field, ValidationError, ValidationInfo

from mmoe.config.base import Config
from mmoe.config.load import sentences
from mmoe.errors import ConfigError, brief, did_you_mean
from mmoe.optional import needs


class KindConfig(Config):
    """Configures a part that is chosen by `kind`; the subclass of that kind declares its other keys."""

    kind: str
    name: str = Field(default="", pattern=r"^[\w.-]*$")  # tells two of a kind apart; empty: the kind

    @property
    def label(self) -> str:
        """Give what the part is called in messages, records and checkpoints."""
        return self.name or self.kind


T = TypeVar("T")
K = TypeVar("K", bound=KindConfig)


class Kinds(Generic[T]):
    """Finds the kinds of one sort of part by name, each an object of the class `base`.

    `built_in` maps a kind to ``"module:object"``, which is imported when it is asked for. An installed package offers
    its own by an entry point of `group` (its name the kind, its value ``module:object``); what is imported anyway, such
    as the `extensions` of a run, registers by `register`.
    """

    def __init__(self, what: str, group: str, base: type[Any], built_in: Mapping[str, str]) -> None:
        """`what` names one part in messages, e.g. "callback"."""
        self.what, self.group, self.base = what, group, base
        self._built_in = {kind: EntryPoint(kind, where, group) for kind, where in built_in.items()}
        self._registered: dict[str, T] = {}

    def register(self, kind: str) -> Callable[[T], T]:
        """Register what this is called with, or decorates. Raises ConfigError for a kind that there is already."""

        def take(found: T) -> T:
            if not self._fits(found):
                raise ConfigError(f"{_name(found)} cannot be a {self.what}: {self._remedy}")
            known = self._registered.get(kind)
            if kind in self._built_in or (known is not None and not self._same(known, found)):
                raise ConfigError(f"there is a {self.what} of kind {kind} already; register it by another name")
            self._registered[kind] = found
            return found

        return take

    def kinds(self) -> list[str]:
        """Name every kind there is, by alphabet."""
        return sorted({*self._built_in, *self._registered, *self._offered()})

    def find(self, kind: str) -> T:
        """Find what is of this kind. Raises ConfigError naming the nearest one, PackageError for a missing package."""
        if kind in self._registered:
            return self._registered[kind]
        where = self._built_in.get(kind) or self._offered().get(kind)
        if where is None:
            known = self.kinds()
            hint = did_you_mean(kind, known) or "."
            raise ConfigError(
                f"{brief(kind)} is not a kind of {self.what}{hint} Known are {', '.join(known) or 'none'}; another is "
                f"registered by its package (entry point {self.group}), or by a module among the config's extensions"
            )
        module, _, name = where.value.partition(":")
        try:
            with needs(f"{self.what} {kind}"):
                found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{self.what} {kind} is {where.value}, which cannot be imported ({error}); reinstall its package"
            ) from error
        if not self._fits(found):
            raise ConfigError(f"{where.value}, {self.what} {kind}, is no {self.base.__name__}; mend that package")
        return found

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _fits(self, found: Any) -> bool:
        return isinstance(found, self.base)

    def _same(self, known: T, found: T) -> bool:
        """Whether they are one, of a module that was imported twice."""
        return known == found

    @property
    def _remedy(self) -> str:
        return f"give a {self.base.__name__}"


class ClassRegistry(Kinds[type[T]]):
    """Kinds that are classes derived from `base`.

    A config that names one by its kind alone holds it as ``Annotated[str, AfterValidator(registry.known)]``.
    """

    def known(self, kind: str) -> str:
        """Give the kind back, as a pydantic validator. Raises ValueError as `find`."""
        try:
            self.find(kind)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return kind

    def kinds_that(self, can: Callable[[type[T]], bool]) -> str:
        """Name the kinds whose class can do it, as the remedy of a message; those that cannot be imported are not."""
        found = []
        for kind in self.kinds():
            with suppress(ConfigError):
                if can(self.find(kind)):
                    found.append(kind)
        return " or ".join(found)

    def _fits(self, found: Any) -> bool:
        return isinstance(found, type) and issubclass(found, self.base)

    def _same(self, known: type[T], found: type[T]) -> bool:
        return is_same_class(known, found)

    @property
    def _remedy(self) -> str:
        return f"derive it from {self.base.__name__}"


class Registry(ClassRegistry[K]):
    """Kinds that are classes of configs, which build the part.

    A config holds one as ``Annotated[SerializeAsAny[Base], BeforeValidator(registry)]``.
    """

    def __call__(self, value: Any, info: ValidationInfo) -> Any:
        """Validate a mapping with `kind` by the class of that kind, as a pydantic validator."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            example = next(iter(self.kinds()), "NAME")
            raise ValueError(f"give a mapping that says which {self.what} it is, e.g. {{kind: {example}}}")
        try:
            kind = self.find(value["kind"])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        try:
            return kind.model_validate_json(json.dumps(value), context=info.context)
        except TypeError as error:
            raise ValueError(
                f"it holds what JSON cannot ({error}); give plain numbers, texts, lists and mappings"
            ) from None
        except ValidationError as error:
            raise ValueError("; ".join(sentences(kind, value, error))) from None


def distinct(parts: tuple[K, ...]) -> tuple[K, ...]:
    """Give the parts back. Raises ValueError for two of one name."""
    labels = [part.label for part in parts]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"two are named {', '.join(twice)}; give each a name of its own, e.g. name: {twice[0]}_2")
    return parts


def is_same_class(known: type, found: type) -> bool:
    """Return whether two classes are one, of a module that was imported twice."""
    return (known.__module__, known.__qualname__) == (found.__module__, found.__qualname__)


def _name(found: Any) -> str:
    return found.__name__ if isinstance(found, type) else f"an object of {type(found).__name__}"
