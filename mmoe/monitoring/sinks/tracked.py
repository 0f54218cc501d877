"""Keeps the name by which a tracker knows a run in the run's folder, so that a run that goes on is the same there."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.errors import DataError, OutputError
from mmoe.files import write_atomically, writes
from mmoe.recipe.monitoring import SinkConfig, SinkContext


@contextmanager
def tracker_errors(label: str) -> Iterator[None]:
    """Turn any error that a tracker raises into an OutputError that names the sink by `label`: the run ends saved."""
    try:
        yield
    except Exception as error:
        raise OutputError(
            f"monitoring.sinks: {label} failed ({type(error).__name__}: {error}); mend it, or leave that sink out, and "
            "give the same command again"
        ) from error


@dataclass
class TrackedRun:
    """Holds a run as a tracker knows it: its `id` there, and its `last` step, known only where it was closed."""

    path: Path
    id: str
    last: int | None

    @classmethod
    def read(cls, path: Path) -> "TrackedRun | None":
        """Read the tracked run from `path`; None where there is none yet.

        Raises DataError for a file that holds something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(found["id"]), found["last"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{path} names no run of a tracker ({error}); delete it to begin another there") from error

    @classmethod
    def new(cls, path: Path) -> "TrackedRun":
        """Make a tracked run with a new id, and keep it in `path`."""
        run = cls(path, secrets.token_hex(4), None)
        run.save(None)
        return run

    def ends_by(self, step: int) -> bool:
        """Return whether the tracker surely holds nothing of the run after `step`."""
        return self.last is not None and self.last <= step

    def save(self, last: int | None) -> None:
        """Write that the run was closed after step `last`, or (None) that it is open. Raises OutputError."""
        self.last = last
        with writes(self.path):
            write_atomically(self.path, json.dumps({"id": self.id, "last": last}))


class TrackerSink:
    """Holds what the sinks of all trackers have in common: the run there, and no state of their own.

    A tracker writes to its own files or database, so that a checkpoint keeps nothing for it.
    """

    def __init__(self, config: SinkConfig, context: SinkContext) -> None:
        self._context = context
        self._path = context.folder / f"tracked-{config.label}.json"
        self._run: Any = None  # as the tracker's package gives it, while it is open
        self._last = 0  # step

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: a tracker writes to its own files or database."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""

    def close(self) -> None:
        """Finish the session of the run. Raises OutputError."""
        self._finish()

    def _finish(self) -> None:
        """Close the run there, where it is open, and note its last step."""
        raise NotImplementedError
