"""Defines the base class of every configuration node, and the types that several of them share."""

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo

from mmoe.addresses import check_address
from mmoe.errors import DataError


class Config(BaseModel):
    """Is a node of the configuration tree: strict (no coercion), frozen, finite, and closed to unknown keys.

    Each component declares its own subclass next to its code; `mmoe.recipe.config.RunConfig` joins them.
    A cross-field rule is a `model_validator(mode="after")` that raises `ValueError` with reason and remedy.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def check_layer(cls, below: dict[str, Any], above: dict[str, Any]) -> None:
        """Raise ValueError where a change that `above` (a child file, overrides) makes to `below` leaves something
        unsaid; both are plain mappings, not yet validated."""


C = TypeVar("C", bound=Config)


def _address(value: str, info: ValidationInfo) -> str:
    if not value.strip():
        raise ValueError("it is empty, which names no folder and no file; give a path, or leave the key out")
    try:
        check_address(value)
    except DataError as error:
        raise ValueError(str(error)) from None
    change = (info.context or {}).get("address")
    return change(value) if change else value


def _finite(value: Any) -> Any:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inside:
        _finite(each)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds {value}, which is no finite number; use null where no limit is meant")
    return value


Address = Annotated[str, AfterValidator(_address)]
"""A local path or a URL, without a secret in it. Every key that names a place is of this type, so that
`change_addresses` finds it."""

Options = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Keys of a config that is chosen elsewhere, as plain values without infinities."""


def change_addresses(config: C, change: Callable[[str], str]) -> C:
    """Give the config with every `Address` in it replaced by `change` of it."""
    return type(config).model_validate_json(config.model_dump_json(), context={"address": change})
