"""The kinds of raw recordings that can be prepared, by name."""

import importlib
from collections.abc import Callable
from functools import partial

from mmoe.errors import ConfigError, brief, did_you_mean
from mmoe.optional import needs
from mmoe.preparation.sources.base import Source

_BUILT_IN = (
    "text",
    "image_caption",
    "audio_text",
    "webdataset",
    "video",
    "donkeycar",
    "comma2k19",
    "nuscenes",
    "bridge",
    "lerobot",
    "simulated_drive",
)


def _built_in(kind: str) -> Source:
    with needs(f"preparing {kind}"):
        return importlib.import_module(f"{__name__}.{kind}").SOURCE


SOURCES: dict[str, Callable[[], Source]] = {kind: partial(_built_in, kind) for kind in _BUILT_IN}
"""How each source comes: its module is loaded when it is asked for, with the packages that it needs."""


def find_source(kind: str) -> Source:
    """Find the source of this kind. Raises ConfigError naming the nearest one."""
    if kind not in SOURCES:
        hint = did_you_mean(kind, SOURCES) or "."
        raise ConfigError(f"{brief(kind)} is not a kind of source{hint} Known are {', '.join(SOURCES)}")
    return SOURCES[kind]()
