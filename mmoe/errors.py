"""Defines the errors a user is meant to read: one sentence that names the place, the fault and the remedy."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST_NAME = 100  # of names that are compared


class MmoeError(Exception):
    """Is the base of all errors whose message is for the user; the CLI prints them without a traceback."""

    exit_code = 1  # of the process that one of them ends


class ConfigError(MmoeError):
    """Says why a configuration cannot run: the key, the reason and the remedy."""

    exit_code = 2  # as for a wrong command line: the same command would fail again


class DataError(MmoeError):
    """Says why a file or sample cannot be used: the file, the key inside it and the remedy."""


class MissingFileError(DataError):
    """Says that a file is not where its address says."""


class Refused(DataError):  # noqa: N818  # what became of an item, the word its lists and messages use
    """Says why an item cannot become a sample: in full, and as the class `reason` that it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that the exception survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def counted_as(reason: str) -> Iterator[None]:
    """Turn a DataError that names no class into `Refused` of this one."""
    try:
        yield
    except Refused:
        raise
    except DataError as error:
        raise Refused(reason, str(error)) from error


class PackageError(MmoeError):
    """Says that an optional package which a config asks for is not usable here."""

    exit_code = ConfigError.exit_code


class OutputError(MmoeError):
    """Says that a command cannot write a file: the disk is full, or the place is not writable."""


class CheckpointError(MmoeError):
    """Says why a checkpoint cannot be written or read."""


class DivergenceError(MmoeError):
    """Says that the gradients of a training step are not finite; nothing was updated."""


def brief(value: Any, most: int = 100, quoted: bool = True) -> str:
    """Write a value for a sentence, cut after `most` characters; text stands in quotes unless `quoted` is False."""
    text = repr(value) if quoted or not isinstance(value, str) else value
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Say which of the `known` names is meant: ``; did you mean <prefix>near?``, empty where none is near."""
    near = near_name(name, known)
    return f"; did you mean {prefix}{near}?" if near else ""


def near_name(name: str, known: Iterable[str]) -> str | None:
    """Find the name that is meant: one slip in four characters away, or the only one that begins so or has these words.

    A slip is a character that is wrong, missing or too much, or two that changed places. None where none is near.
    """
    name, names = name[:_LONGEST_NAME].lower(), {each.lower(): each for each in known if len(each) <= _LONGEST_NAME}
    for each in difflib.get_close_matches(name, names, n=5):
        if _slips(name, each) <= max(len(name), len(each)) // 4:
            return names[each]
    holding = [each for each in names if len(name) > 3 and (each.startswith(name) or f"_{name}_" in f"_{each}_")]
    return names[holding[0]] if len(holding) == 1 else None


def _slips(a: str, b: str) -> int:
    """The restricted edit distance with transpositions (Damerau 1964, as optimal string alignment)."""
    before, last = list[int](), list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
