"""The errors a user is meant to read: one sentence that names the place, the fault and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Any


class MmoeError(Exception):
    """Base of every error whose message is addressed to the user; the CLI prints it without a traceback."""


class ConfigError(MmoeError):
    """A configuration that cannot run: names the key, the reason and the remedy."""


class DataError(MmoeError):
    """A file or sample that cannot be used: names the file, the key inside it and the remedy."""


class MissingFileError(DataError):
    """A file that is not where its address says."""


class Refused(DataError):  # noqa: N818  # `raise Refused(...)` is the sentence it is
    """An item that cannot become a sample: `reason` is the class it is counted under, the message says it in full."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that the exception survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


class BackendError(MmoeError):
    """An optional package that a config asks for and that is not usable here."""


class OutputError(MmoeError):
    """A file that a command writes and cannot: the disk is full, or the place is not writable."""


class CheckpointError(MmoeError):
    """A checkpoint that cannot be written or read."""


class DivergenceError(MmoeError):
    """A training step whose gradients are not finite; nothing was updated."""


def brief(value: Any, most: int = 100, quoted: bool = True) -> str:
    """Write a value for a sentence, cut after `most` characters; text stands in quotes unless `quoted` is False."""
    text = repr(value) if quoted or not isinstance(value, str) else value
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Say which of the `known` names is meant: ``; did you mean <prefix>near?``, empty where none is near."""
    near = difflib.get_close_matches(name[:100], [each for each in known if len(each) <= 100], n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
