"""Configures the callbacks that a run's config names (`training.callbacks`)."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny

from mmoe.config.registry import KindConfig, Registry, distinct


class CallbackConfig(KindConfig):
    """Configures a callback of the training loop; a subclass declares its keys and builds it."""

    def build(self) -> Any:
        """Build the `mmoe.training.callback.Callback` (of a room below) that this configures, named `label`."""
        raise NotImplementedError


CALLBACKS = Registry[CallbackConfig]("callback", "mmoe.callbacks", CallbackConfig, {})
"""The kinds of callbacks. What records, shows and evaluates a run is configured where it lives and is always there."""

ChosenCallbacks = Annotated[
    tuple[Annotated[SerializeAsAny[CallbackConfig], BeforeValidator(CALLBACKS)], ...], AfterValidator(distinct)
]
