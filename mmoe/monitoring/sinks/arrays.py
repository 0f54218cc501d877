"""Writes the tables of records as columns to `tables/` (`mmoe.monitoring.tables` says how)."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mmoe.errors import OutputError
from mmoe.files import write_atomically, writes
from mmoe.monitoring import tables
from mmoe.monitoring.record import StepRecord
from mmoe.recipe.monitoring import SinkConfig, SinkContext


class ArraysConfig(SinkConfig):
    """Writes tables to `tables/` in the run's folder, which reports are drawn from."""

    owns_files: ClassVar[bool] = True

    kind: Literal["arrays"] = "arrays"
    records_per_part: int = Field(default=64, gt=0)
    flush_seconds: float = Field(default=60.0, gt=0)  # and at every checkpoint

    def build(self, context: SinkContext) -> "ArraysSink":
        """Build the store's writer."""
        return ArraysSink(context.folder / tables.FOLDER, self.records_per_part, self.flush_seconds)


class ArraysSink:
    """Collects records into parts; the last one, not full yet, is written again as it grows, whole or not at all."""

    def __init__(self, folder: Path, records_per_part: int, flush_seconds: float) -> None:
        self.folder, self.records_per_part, self.flush_seconds = folder, records_per_part, flush_seconds
        self._records: list[StepRecord] = []  # of the open part, and those after it that the disk refused
        self._stored = 0  # how many of them are on the disk
        self._kept: list[StepRecord] = []  # what the disk had refused before the checkpoint, and may have taken after
        self._flushed = time.monotonic()

    def write(self, record: StepRecord) -> None:
        """Take the record's tables, where it has any; a part that is full, or old enough, is written."""
        if not record.tables:
            return
        self._records.append(record)
        if len(self._records) >= self.records_per_part or time.monotonic() - self._flushed >= self.flush_seconds:
            self._flush()

    def rewind(self, step: int) -> None:
        """Delete the parts after `step`, the last one first, and cut the one that it falls into.

        Raises DataError for a store of another version, and then nothing is deleted.
        """
        tables.table_names(self.folder)  # refuses another version
        waiting = {record.step: record for record in (*self._kept, *self._records[self._stored :])}
        stored: list[StepRecord] = []
        with writes(self.folder):
            for aside in self.folder.glob(".step-*") if self.folder.is_dir() else ():
                aside.unlink()  # a part that was being written when its process was killed
            for first, path in reversed(tables.part_files(self.folder)):
                if first <= step:
                    found = tables.decode_part(path.read_bytes(), path)
                    stored = [record for record in found if record.step <= step]
                    if len(stored) < len(found):
                        write_atomically(path, tables.encode(stored))
                    break
                path.unlink()
        last = stored[-1].step if stored else 0
        if len(stored) >= self.records_per_part:
            stored = []
        self._records = stored + [waiting[number] for number in sorted(waiting) if last < number <= step]
        self._stored, self._kept = len(stored), []
        self._flush()

    def state_dict(self) -> dict[str, Any]:
        """Write the records that are not on the disk yet, and return those that it refuses, as parts."""
        try:
            self._flush()
        except OutputError:
            rest = self._parts([*self._kept, *self._records[self._stored :]])
            return {"unwritten": [base64.b64encode(tables.encode(part)).decode() for part in rest]}
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the records of `state_dict`: `rewind` writes the ones that are not on the disk yet."""
        for part in state.get("unwritten", []):
            self._kept += tables.decode_part(base64.b64decode(part), self.folder)

    def close(self) -> None:
        """Write the records that are left. Raises OutputError."""
        self._flush()

    def _flush(self) -> None:
        while self._stored < len(self._records):
            part = next(self._parts(self._records))
            path = tables.part_path(self.folder, part[0].step)
            with writes(path, "its tables are kept in the checkpoint and written when the run goes on"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, tables.encode(part))
            self._stored = len(part)
            if len(part) == self.records_per_part or len(part) < len(self._records):
                del self._records[: len(part)]
                self._stored = 0
        self._flushed = time.monotonic()

    def _parts(self, records: list[StepRecord]) -> Iterator[list[StepRecord]]:
        """Cut records into parts: in order, of the same tables and shapes, and none too long."""
        part: list[StepRecord] = []
        for record in records:
            if part and (len(part) == self.records_per_part or _schema(record) != _schema(part[0])):
                yield part
                part = []
            part.append(record)
        if part:
            yield part


def _schema(record: StepRecord) -> dict[str, tuple[int, ...]]:
    return {name: table.shape for name, table in record.tables.items()}
