"""The kinds of raw recordings that can be prepared, by name."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmoe.errors import ConfigError, brief, did_you_mean
from mmoe.preparation.simulation import simulated_drive
from mmoe.preparation.sources import (
    audio_text,
    bridge,
    comma2k19,
    donkeycar,
    image_caption,
    lerobot,
    nuscenes,
    text,
    video,
    webdataset,
)
from mmoe.preparation.sources.base import Item, Quarantine, Source


def _simulated_items(_: Path, config: simulated_drive.SimulatedDriveConfig, quarantine: Quarantine) -> Iterator[Item]:
    """Recordings come out of the config alone; there is no input to read and nothing to refuse."""
    for number in range(config.recordings):
        key = f"drive-{number:06d}"
        yield Item(key, key, partial(simulated_drive.make_recording, config, number))


SIMULATED_DRIVE = Source(
    kind=simulated_drive.KIND,
    clock=simulated_drive.CLOCK,
    skew_budget_ns=simulated_drive.SKEW_BUDGET_NS,
    config=simulated_drive.SimulatedDriveConfig,
    items=_simulated_items,
    vector_names=simulated_drive.VECTOR_NAMES,
    action_period_ns=simulated_drive.ACTION_PERIOD_NS,
    generated=True,
)

SOURCES: dict[str, Source] = {
    source.kind: source
    for source in (
        text.SOURCE,
        image_caption.SOURCE,
        audio_text.SOURCE,
        webdataset.SOURCE,
        video.SOURCE,
        donkeycar.SOURCE,
        comma2k19.SOURCE,
        nuscenes.SOURCE,
        bridge.SOURCE,
        lerobot.SOURCE,
        SIMULATED_DRIVE,
    )
}


def find_source(kind: str) -> Source:
    """Find the source of this kind. Raises ConfigError naming the nearest one."""
    if kind not in SOURCES:
        hint = did_you_mean(kind, SOURCES) or "."
        raise ConfigError(f"{brief(kind)} is not a kind of source{hint} Known are {', '.join(SOURCES)}")
    return SOURCES[kind]
