"""Parts that a config names by `kind`: built in, registered by a decorator, or offered by an installed package."""

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


class KindConfig(Config):
    """Configures a part that is chosen by `kind`; the subclass of that kind declares its other keys."""

    kind: str
    name: str = Field(default="", pattern=r"[\w.-]*")  # tells two of a kind apart; empty: the kind

    @property
    def label(self) -> str:
        """Give what the part is called in messages, records and checkpoints."""
        return self.name or self.kind


T = TypeVar("T")
K = TypeVar("K", bound=KindConfig)


class ClassRegistry(Generic[T]):
    """The kinds of one sort of part, each a class; a config names one by its kind alone.

    `built_in` maps a kind to ``"module:Class"``, which is imported when it is asked for. An installed package offers
    its own by an entry point of `group` (its name the kind, its value ``module:Class``); what is imported anyway
    registers by the decorator `register`. A config holds a kind as ``Annotated[str, AfterValidator(registry.known)]``.
    """

    def __init__(self, what: str, group: str, base: type[T], built_in: Mapping[str, str]) -> None:
        """`what` names one part in messages, e.g. "callback"."""
        self.what, self.group, self.base = what, group, base
        self._built_in = {kind: EntryPoint(kind, where, group) for kind, where in built_in.items()}
        self._registered: dict[str, type[T]] = {}

    def register(self, kind: str) -> Callable[[type[T]], type[T]]:
        """Register the class below as this kind. Raises ConfigError for a kind that there is already."""

        def take(found: type[T]) -> type[T]:
            if not issubclass(found, self.base):
                raise ConfigError(f"{found.__name__} cannot be a {self.what}: derive it from {self.base.__name__}")
            known = self._registered.get(kind)
            if kind in self._built_in or (known is not None and _place(known) != _place(found)):
                raise ConfigError(f"there is a {self.what} of kind {kind} already; register it by another name")
            self._registered[kind] = found
            return found

        return take

    def kinds(self) -> list[str]:
        """Name every kind there is, by alphabet."""
        return sorted({*self._built_in, *self._registered, *self._offered()})

    def find(self, kind: str) -> type[T]:
        """Find the class of this kind. Raises ConfigError naming the nearest one."""
        if kind in self._registered:
            return self._registered[kind]
        where = self._built_in.get(kind) or self._offered().get(kind)
        if where is None:
            known = self.kinds()
            hint = did_you_mean(kind, known) or "."
            raise ConfigError(
                f"{brief(kind)} is not a kind of {self.what}{hint} Known are {', '.join(known) or 'none'}; another is "
                f"registered by the package that has it (entry point {self.group}), or by importing its module first"
            )
        module, _, name = where.value.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{self.what} {kind} is {where.value}, which cannot be imported ({error}); reinstall its package"
            ) from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(f"{where.value}, {self.what} {kind}, is no {self.base.__name__}; mend that package")
        return found

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

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


class Registry(ClassRegistry[K]):
    """The kinds of one sort of part, each the class of its config, which builds the part.

    A config holds one as ``Annotated[SerializeAsAny[Base], BeforeValidator(registry)]``.
    """

    def __call__(self, value: Any, info: ValidationInfo) -> Any:
        """Validate a mapping with `kind` by the class of that kind, as a pydantic validator."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"give a mapping that says which {self.what} it is, e.g. {{kind: {self.kinds()[0]}}}")
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
        raise ValueError(f"two are named {', '.join(twice)}; give each a name of its own, e.g. name: {twice[0]}-2")
    return parts


def _place(found: type) -> tuple[str, str]:
    return found.__module__, found.__qualname__
