"""Offers the simulated drive as a source: its recordings come out of the config alone."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmoe.preparation.simulation import simulated_drive
from mmoe.preparation.sources.base import Item, Refuse, Source


def _simulated_items(_: Path, config: simulated_drive.SimulatedDriveConfig, quarantine: Refuse) -> Iterator[Item]:
    """Recordings come out of the config alone; there is no input to read and nothing to refuse."""
    for number in range(config.recordings):
        key = f"drive-{number:06d}"
        yield Item(key, key, partial(simulated_drive.make_recording, config, number))


SOURCE = Source(
    kind=simulated_drive.KIND,
    clock=simulated_drive.CLOCK,
    skew_budget_ns=simulated_drive.SKEW_BUDGET_NS,
    config=simulated_drive.SimulatedDriveConfig,
    items=_simulated_items,
    vector_names=simulated_drive.VECTOR_NAMES,
    action_period_ns=simulated_drive.ACTION_PERIOD_NS,
    generated=True,
)
