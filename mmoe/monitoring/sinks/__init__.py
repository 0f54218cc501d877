"""Declares where records go: one kind of sink a file, each with the config that names it in `monitoring.sinks`."""

from typing import Any, Protocol

from mmoe.monitoring.record import StepRecord


class Sink(Protocol):
    """Takes the records of a run, in order of their steps.

    `load_state_dict` (where there is a state) and then `rewind` come before the first record. No method but `rewind`
    may leave anything of a record half done: a record that cannot be written is kept, and comes before the next one.
    """

    def write(self, record: StepRecord) -> None:
        """Take a record. Raises OutputError where it cannot be written; it is kept."""

    def rewind(self, step: int) -> None:
        """Purge every record after `step`, at which the run now stands; 0 purges all. Raises OutputError."""

    def state_dict(self) -> dict[str, Any]:
        """Put the records that were taken on the disk, and return as JSON those that it refused, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the records that `state_dict` gave, of which some may have been written since."""

    def close(self) -> None:
        """Write the records that are left, and release what is open. Raises OutputError."""
