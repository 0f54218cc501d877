"""Writes a line a record to `metrics.jsonl`, its scalars and notes flat.

Lines of steps that a run undid move to `metrics-undone.jsonl`.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmoe.errors import DataError, OutputError
from mmoe.monitoring.lines import LineFile
from mmoe.monitoring.record import StepRecord
from mmoe.recipe.monitoring import SinkConfig, SinkContext

METRICS, UNDONE = "metrics.jsonl", "metrics-undone.jsonl"
KEPT_RECORDS = "its records are kept in the checkpoint and written when the run goes on"
_BATCH = 1000  # lines that are moved at once


class JsonlConfig(SinkConfig):
    """Writes scalars and notes to `metrics.jsonl` in the run's folder, which reports are drawn from."""

    owns_files: ClassVar[bool] = True

    kind: Literal["jsonl"] = "jsonl"

    def build(self, context: SinkContext) -> "JsonlSink":
        """Open the file in the run's folder as a sink. Raises OutputError."""
        return JsonlSink(context.folder)


class JsonlSink:
    """Appends a line a record, and moves undone lines so that a crash at any moment loses none and doubles none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = LineFile(folder / METRICS, KEPT_RECORDS)
        self._kept: list[str] = []  # what the disk had refused before the checkpoint, and may have taken after it

    def write(self, record: StepRecord) -> None:
        """Append the record's line, after those that the disk refused before."""
        flat = {"step": record.step, "session": record.session, **record.scalars, **record.notes}
        self._file.write(json.dumps(flat))

    def rewind(self, step: int) -> None:
        """Move the lines after `step` to the file of undone ones.

        Raises OutputError, and DataError for a line that is none of a record.
        """
        begin = None
        for place, line in self._file.backwards():
            if self._step(line) <= step:
                break
            begin = place
        late = [line for line in self._file.pending if self._step(line) > step]
        if begin is not None or late:
            self._move(begin, late)
        self._file.pending = [line for line in self._file.pending if self._step(line) <= step]
        kept, self._kept = self._kept, []
        if kept:  # the file may have them by now, the first ones at least
            last = self._file.last
            self._file.pending = kept[kept.index(last) + 1 :] if last in kept else kept
        self._file.write()

    def state_dict(self) -> dict[str, Any]:
        """Write the lines that are pending, durably, and return those that the disk refuses."""
        with suppress(OutputError):
            self._file.write()
            self._file.sync()
        return {"unwritten": [*self._kept, *self._file.pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the lines of `state_dict`: `rewind` writes the ones that are not in the file yet."""
        self._kept = list(state.get("unwritten", []))

    def close(self) -> None:
        """Write the lines that are pending, and close the file. Raises OutputError."""
        try:
            self._file.write()
        finally:
            self._file.close()

    def _move(self, begin: int | None, late: Iterable[str]) -> None:
        """Copy, then cut off. No two lines are equal, so a copy that was cut short goes on after its last line."""
        undone = LineFile(self._folder / UNDONE, f"{METRICS} still has all that it had")
        try:
            if begin is not None:
                last = undone.last
                start = next((end for end, line in self._file.forwards(begin) if line == last), begin)
                lines = (line for _, line in self._file.forwards(start))
                while batch := list(islice(lines, _BATCH)):
                    undone.write(*batch)
            undone.write(*late)
            undone.sync()
        finally:
            undone.close()
        if begin is not None:
            self._file.cut(begin)

    def _step(self, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self._folder / METRICS}: a line is not the record of a step ({line[:80]!r}); remove that line"
            ) from error
