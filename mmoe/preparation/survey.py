"""Looks at recordings that nobody has prepared yet: which reader takes them, how many, and a few of them as samples."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmoe.config.load import merge, validate
from mmoe.data.load.reading import reading
from mmoe.errors import ConfigError, DataError, PackageError
from mmoe.preparation.listing import can_split, check_named, list_items, split_items
from mmoe.preparation.prepare import PrepareConfig
from mmoe.preparation.rows import make_sample
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Refused
from mmoe.schema.sample import Sample

SAMPLES = 12  # that are made, from all over the recordings
_HELDOUT = {"heldout_share", "heldout_by", "heldout_list"}  # options: who gives one of them means it


@dataclass
class Survey:
    """Holds what a reader finds: how many items of how many recordings, and the `samples` made of a few of them.

    `options` are those that the reader needs for this input, and what is held out; `refused` counts by reason what it
    cannot use, `example` says the first of that in full. Where nothing says what to hold out and there is too little
    for that, it is nothing (`nothing_heldout`).
    """

    kind: str
    options: dict[str, Any]
    items: int = 0
    recordings: int = 0
    samples: list[Sample] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    example: str = ""
    nothing_heldout: bool = False


def survey(kind: str, input: str | Path, options: dict[str, Any] | None = None) -> Survey:
    """Look at `input` with the reader of this kind, with `options` over those that it suggests itself.

    Raises DataError where nothing can be prepared of it: no item, none that is readable, or none to hold out though the
    options ask for it.
    """
    check_named(input)
    source, path = SOURCES.find(kind), Path(input)
    suggested: dict[str, Any] = {}
    if source.suggest is not None and path.exists():
        with reading("source", str(input), "repair its description"):
            suggested = source.suggest(path)
    found = Survey(kind, merge(suggested, options or {}))
    given = dict(found.options)
    prepare = validate(PrepareConfig, given.pop("prepare", {}), f"options of {kind}, under prepare")
    reader = validate(source.config, given, f"options of {kind}")

    def refuse(key: str, why: Refused) -> None:
        found.refused[why.reason] += 1
        found.example = found.example or str(why)

    items = list_items(source, path, reader, refuse)
    found.items, found.recordings = len(items), len({item.recording for item in items})
    for item in items[:: max(1, len(items) // SAMPLES)][:SAMPLES]:
        try:
            found.samples.append(make_sample(item))
        except Refused as refusal:
            refuse(item.key, refusal)
    if not found.samples:
        raise DataError(
            f"{input}: nothing in it can be prepared as {kind}; {found.example or 'it holds nothing of this kind'}"
        )
    if prepare.model_fields_set.isdisjoint(_HELDOUT):
        found.nothing_heldout = not can_split(source, items, [], prepare.holdout())
        share = 0 if found.nothing_heldout else prepare.heldout_share
        found.options = merge({"prepare": {"heldout_share": share}}, found.options)
    else:
        split_items(source, items, [], prepare.holdout())
    return found


def detect(input: str | Path) -> Survey:
    """Look at `input` with every reader; return what the one finds that refuses least of it, if it takes most of it.

    Raises DataError where that is no reader, or several.
    """
    check_named(input)
    if not Path(input).exists():
        raise DataError(f"{input} does not exist; give the file or folder of the recordings to prepare")
    found = sorted(_surveys(input), key=lambda each: each.refused.total())
    found = [each for each in found if each.refused.total() == found[0].refused.total() < each.items]
    if len(found) == 1:
        return found[0]
    kinds = [each.kind for each in found] or [kind for kind in SOURCES.kinds() if not SOURCES.find(kind).generated]
    why = "can be read in several ways" if found else "is not what any reader takes as it is"
    raise DataError(
        f"{input} {why}; say its kind in place of auto: {', '.join(kinds)} (docs/guide.md says what each is)"
    )


def _surveys(input: str | Path) -> Iterator[Survey]:
    for kind in SOURCES.kinds():
        try:
            if not SOURCES.find(kind).generated:
                yield survey(kind, input)
        except (DataError, ConfigError, PackageError):  # this reader does not take it
            continue
