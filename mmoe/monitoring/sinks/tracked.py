"""Under which name a tracker knows a run, kept in the run's folder, so that a run that goes on is the same there."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmoe.errors import DataError, OutputError
from mmoe.files import write_atomically, writes


@contextmanager
def tracker_errors(label: str) -> Iterator[None]:
    """Turn what a tracker raises, whatever it is, into an OutputError: the run ends saved, and names the sink."""
    try:
        yield
    except Exception as error:
        raise OutputError(
            f"monitoring.sinks: {label} failed ({type(error).__name__}: {error}); mend it, or leave that sink out, and "
            "give the same command again"
        ) from error


@dataclass
class TrackedRun:
    """The run as a tracker knows it: its `id` there, and its `last` step, known only where it was closed."""

    path: Path
    id: str
    last: int | None

    @classmethod
    def read(cls, path: Path) -> "TrackedRun | None":
        """Read it; None where there is none yet. Raises DataError for a file that holds something else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(found["id"]), found["last"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{path} names no run of a tracker ({error}); delete it to begin another there") from error

    @classmethod
    def new(cls, path: Path) -> "TrackedRun":
        """Make a new id, and keep it."""
        run = cls(path, secrets.token_hex(4), None)
        run.save(None)
        return run

    def ends_by(self, step: int) -> bool:
        """Whether it surely holds nothing after `step`."""
        return self.last is not None and self.last <= step

    def save(self, last: int | None) -> None:
        """Say that the run was closed after step `last`; None: it is open. Raises OutputError."""
        self.last = last
        with writes(self.path):
            write_atomically(self.path, json.dumps({"id": self.id, "last": last}))
