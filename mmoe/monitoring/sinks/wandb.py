"""Logs every curve to Weights & Biases, in one run there for a run here."""

import logging
from types import ModuleType
from typing import Any, Literal

from mmoe.errors import PackageError
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.boards import chart_groups
from mmoe.monitoring.sinks.tracked import TrackedRun, TrackerSink, tracker_errors
from mmoe.optional import require
from mmoe.recipe.monitoring import SinkConfig, SinkContext

logger = logging.getLogger(__name__)


class WandbConfig(SinkConfig):
    """Sends scalars, and curves by layer and expert, to Weights & Biases; needs `wandb login`, or `mode: offline`."""

    kind: Literal["wandb"] = "wandb"
    project: str
    entity: str | None = None
    group: str | None = None  # null: the name of the run's folder
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"

    def build(self, context: SinkContext) -> "WandbSink":
        """Build the sink. Raises PackageError where wandb is not installed."""
        return WandbSink(require("wandb", "monitoring.sinks"), self, context)


class WandbSink(TrackerSink):
    """Logs records to Weights & Biases by step; a rewind truncates the run there (`resume_from`).

    Where that cannot be done (offline, or a server without it) the run goes on as a new one of the same group, and
    the undone steps stay in the old one. Ids are kept in `tracked-wandb.json`.
    """

    def __init__(self, wandb: ModuleType, config: WandbConfig, context: SinkContext) -> None:
        super().__init__(config, context)
        self._wandb, self._config = wandb, config

    def write(self, record: StepRecord) -> None:
        """Log the record's points and notes at its step."""
        notes = {f"notes/{name}": note for name, note in record.notes.items()}
        with tracker_errors(self._config.label):
            self._run.log(dict(chart_groups(record)) | notes, step=record.step)
        self._last = record.step

    def rewind(self, step: int) -> None:
        """Go on after `step`: in the same run, or where it cannot be truncated in a new one of its group."""
        self._finish()
        self._last = step
        found = TrackedRun.read(self._path)
        if found and step and found.ends_by(step):
            self._start(found, resume="allow", id=found.id)
        elif found and step and self._config.mode == "online" and self._truncated(found, step):
            pass
        else:
            new = TrackedRun.new(self._path)
            self._start(new, id=new.id)

    def _truncated(self, tracked: TrackedRun, step: int) -> bool:
        try:
            self._start(tracked, resume_from=f"{tracked.id}?_step={step}")
        except PackageError as error:
            logger.warning("%s; the run goes on there as a new one of the same group", error)
            return False
        return True

    def _start(self, tracked: TrackedRun, **how: Any) -> None:
        config, folder = self._config, self._context.folder
        try:
            self._run = self._wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group or folder.name,
                name=folder.name,
                tags=list(config.tags),
                mode=config.mode,
                dir=str(folder),
                config=self._context.config,
                settings=self._wandb.Settings(symlink=False, console="off"),
                **how,
            )
        except self._wandb.Error as error:
            raise PackageError(
                f"monitoring.sinks: wandb does not start ({error}); log in by `wandb login`, or set its mode to offline"
            ) from error
        tracked.save(None)
        self._tracked = tracked

    def _finish(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            with tracker_errors(self._config.label):
                run.finish()
            self._tracked.save(self._last)
