"""Logs every curve to trackio, in a database on this machine or in a Space."""

from types import ModuleType
from typing import Literal

from mmoe.errors import PackageError
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.boards import chart_groups
from mmoe.monitoring.sinks.tracked import TrackedRun, TrackerSink, tracker_errors
from mmoe.optional import require
from mmoe.recipe.monitoring import SinkConfig, SinkContext


class TrackioConfig(SinkConfig):
    """Writes scalars, and curves by layer and expert, for trackio, on this machine unless `space_id` names a Space."""

    kind: Literal["trackio"] = "trackio"
    project: str
    group: str | None = None  # null: the name of the run's folder
    space_id: str | None = None

    def build(self, context: SinkContext) -> "TrackioSink":
        """Build the sink. Raises PackageError where trackio is not installed."""
        return TrackioSink(require("trackio", "monitoring.sinks"), self, context)


class TrackioSink(TrackerSink):
    """Logs records to trackio by step.

    trackio cannot take back steps, so a run that was undone goes on as a new one of the same group. The name there, the
    folder's with an id, is kept in `tracked-trackio.json`.
    """

    def __init__(self, trackio: ModuleType, config: TrackioConfig, context: SinkContext) -> None:
        super().__init__(config, context)
        self._trackio, self._config = trackio, config

    def write(self, record: StepRecord) -> None:
        """Log the record's points at its step."""
        with tracker_errors(self._config.label):
            self._run.log(dict(chart_groups(record)), step=record.step)
        self._last = record.step

    def rewind(self, step: int) -> None:
        """Go on after `step`: in the same run if it holds nothing later, else in a new one of its group."""
        self._finish()
        self._last = step
        found = TrackedRun.read(self._path)
        self._tracked = found if found and step and found.ends_by(step) else TrackedRun.new(self._path)
        config, name = self._config, self._context.folder.name
        try:
            self._run = self._trackio.init(
                project=config.project,
                name=f"{name}-{self._tracked.id}",
                group=config.group or name,
                space_id=config.space_id,
                config=self._context.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except (ValueError, OSError) as error:
            raise PackageError(f"monitoring.sinks: trackio does not start ({error}); mend that sink's keys") from error
        self._tracked.save(None)

    def _finish(self) -> None:
        if self._run is not None:
            self._run = None
            with tracker_errors(self._config.label):
                self._trackio.finish()  # not the run's own, which trackio would finish again at exit
            self._tracked.save(self._last)
