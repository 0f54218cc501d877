"""Writes every curve for TensorBoard to `tensorboard/` of the run's folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmoe.files import writes
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.boards import chart_groups
from mmoe.optional import needs
from mmoe.recipe.monitoring import SinkConfig, SinkContext

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardConfig(SinkConfig):
    """Writes scalars, and curves by layer and expert, for TensorBoard."""

    owns_files: ClassVar[bool] = True

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, context: SinkContext) -> "TensorboardSink":
        """Build the sink. Raises PackageError where tensorboard is not installed."""
        with needs("monitoring.sinks: tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        return TensorboardSink(context.folder / "tensorboard", SummaryWriter)


class TensorboardSink:
    """Writes events for TensorBoard; undone ones stay in the older files, and it leaves them out by the newer ones."""

    def __init__(self, folder: Path, writer: "type[SummaryWriter]") -> None:
        self._folder, self._class = folder, writer
        self._writer: SummaryWriter | None = None

    def write(self, record: StepRecord) -> None:
        """Add the record's points to their curves."""
        assert self._writer is not None, "rewind opens the file"
        with self._writes():
            for name, value in chart_groups(record):
                self._writer.add_scalar(name, value, record.step)

    def rewind(self, step: int) -> None:
        """Begin a file that purges all points after `step`."""
        self.close()
        with self._writes():
            self._writer = self._class(self._folder, purge_step=step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: TensorBoard writes to its own files."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""

    def close(self) -> None:
        """Close the file."""
        if self._writer:
            with self._writes():
                self._writer.close()
            self._writer = None

    def _writes(self) -> Any:
        return writes(self._folder, "metrics.jsonl beside it has every record")
