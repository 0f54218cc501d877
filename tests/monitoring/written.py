"""Runs' folders with records in them, as the sinks that reports are drawn from write them."""

from pathlib import Path

from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.arrays import ArraysConfig
from mmoe.monitoring.sinks.jsonl import JsonlConfig
from mmoe.recipe.monitoring import SinkContext


def write_records(folder: Path, *records: StepRecord) -> None:
    """Write `records` as all that the run in `folder` has recorded."""
    folder.mkdir(exist_ok=True)
    context = SinkContext(folder, {})
    for sink in (JsonlConfig().build(context), ArraysConfig().build(context)):
        sink.rewind(0)
        for record in records:
            sink.write(record)
        sink.close()
