"""Reads what a run recorded, in memory that does not grow with what is not asked for."""

import json
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.errors import DataError
from mmoe.monitoring import tables
from mmoe.monitoring.sinks.jsonl import METRICS, UNDONE

_TAIL = 1 << 16  # bytes in which the last record is looked for first


class RunReader:
    """Reads the records in a run's folder: scalars as columns, tables by name, and the last record as it is.

    A last line that was cut off is left out. Raises DataError for any other damage, with file and line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / METRICS

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Read ``step`` (i64) and the scalars `names` (f64, NaN where a record has none), a row a record, in order.

        Raises DataError where nothing was trained.
        """
        found = self._columns(self._records(), names)
        if not len(found["step"]):
            raise self._nothing()
        return found

    def undone(self, *names: str) -> dict[str, np.ndarray]:
        """Read the same columns as `columns` of the records that the run took back; empty for most runs.

        They are in the order in which the run took them back.
        """
        path = self.folder / UNDONE
        return self._columns(read_lines(path) if path.is_file() else iter(()), names)

    def notes(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield (step, text) of every record that has the note `name`, those taken back first."""
        for path in (self.folder / UNDONE, self.path):
            for record in read_lines(path) if path.is_file() else ():
                if name in record:
                    yield record["step"], record[name]

    def last(self) -> dict[str, Any]:
        """Read the last record: ``step``, ``session``, scalars and notes by name."""
        if not self.path.is_file():
            raise self._nothing()
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(size - _TAIL, 0))
            *_, end, rest = [b"", b"", *file.read().split(b"\n")]
        for text in (rest, end):
            with suppress(*_DAMAGE):
                return _record(text)
        found = deque(self._records(), maxlen=1)  # of a very long line, or to tell where the damage is
        if not found:
            raise self._nothing()
        return found[0]

    def tables(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tables.TableChunk]:
        """Yield the table `name` of the records after step `start` up to and with `stop`, in order, some at a time."""
        return tables.read(self.folder / tables.FOLDER, name, start, stop)

    def table_names(self) -> list[str]:
        """Return the names of the tables of the last records; none for a dense model."""
        return tables.table_names(self.folder / tables.FOLDER)

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            raise self._nothing()
        return read_lines(self.path)

    def _columns(self, records: Iterator[dict[str, Any]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
        steps, columns = array("q"), {name: array("d") for name in names}
        for record in records:
            steps.append(record["step"])
            for name, column in columns.items():
                column.append(record.get(name, np.nan))
        return {"step": np.array(steps, np.int64), **{name: np.array(column) for name, column in columns.items()}}

    def _nothing(self) -> DataError:
        if self.path.is_file():
            return DataError(f"{self.path} is empty: {self.folder} has no step to report; train it first")
        return DataError(f"{self.path} does not exist: {self.folder} has no step to report; train it first")


_DAMAGE = (ValueError, TypeError, KeyError)


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    record["step"] + 0  # what every record has
    return record


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file of records line by line; the last line may be cut off.

    Raises DataError for any other line that is no record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = _record(line)
            except _DAMAGE as error:
                if not line.endswith(b"\n"):
                    return
                what = "not JSON" if isinstance(error, ValueError) else "not the record of a step"
                raise DataError(f"{path}: line {number} is {what} ({error}); remove that line") from error
            yield record
