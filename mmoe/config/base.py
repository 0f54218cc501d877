"""The base class of every configuration node."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A node of the configuration tree: strict (no coercion), frozen, and closed to unknown keys.

    Each component declares its own subclass next to its code; `mmoe.config.tree.RunConfig` joins them.
    A cross-field rule is a `model_validator(mode="after")` that raises `ValueError` with reason and remedy.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @classmethod
    def check_layer(cls, below: dict[str, Any], above: dict[str, Any]) -> None:
        """Raise ValueError where a change that `above` (a child file, overrides) makes to `below` leaves something
        unsaid; both are plain mappings, not yet validated."""
