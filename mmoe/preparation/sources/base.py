"""Defines what a reader of raw recordings hands to preparation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmoe.config.base import Config
from mmoe.errors import ConfigError, Refused, did_you_mean
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig
from mmoe.schema.sample import Sample

# Records an item that is refused before a sample of it can be made: its key, and why.
Refuse = Callable[[str, Refused], None]


@dataclass(frozen=True)
class Item:
    """Describes a sample still to be made: what the split must know of it, and the picklable call that makes it.

    `make` may raise DataError (or `Refused`, which names the class it is counted under). Its sample has this key
    and recording. `start`, `stop` is the item's extent in its recording where a recording may be cut for the split,
    in the `unit` that messages name; 0, 0 where it may not. Recordings of the highest `rank` are held out first (an
    index of takes); equal ranks are drawn by a keyed hash.
    """

    key: str
    recording: str
    make: Callable[[], Sample]
    start: int = 0
    stop: int = 0
    rank: int = 0
    unit: str = "ns"  # bytes or rows where the source has no clock


@dataclass(frozen=True)
class Vectors:
    """Names the dimensions of vectors by modality, and holds the period of the rows of an action table (0: none).

    `notes` are sentences for whoever prepares the source: what was chosen where it could have been otherwise.
    """

    names: dict[str, tuple[str, ...]]
    action_period_ns: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Reads a kind of raw recording; `items` lists cheaply and in a fixed order what `input` holds.

    `clock` and `skew_budget_ns` are those of `SourceManifest`; `vector_names` names the dimensions by modality name.
    A `generated` source reads no input. `rig` names the cameras, unless the config does by a key `rig`. Where names and
    period depend on what `input` holds, `describe` reads them. `suggest` looks at an input for options that it needs
    and the defaults do not say, for the first recipe that `mmoe init` writes. `categories` names the values 0, 1, ...
    of dimensions of actions that are no quantities; a config gives them by a key `categories`.
    """

    kind: str
    clock: str
    skew_budget_ns: int
    config: type[Config]
    items: Callable[[Path, Any, Refuse], Iterator[Item]]
    vector_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    action_period_ns: int = 0
    generated: bool = False
    rig: Rig = STANDARD
    describe: Callable[[Path, Any], Vectors] | None = None
    suggest: Callable[[Path], dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def described(self, input: Path, config: Config) -> "Source":
        """Return this source with rig and categories of this config, and vector names and action period of this input.

        Raises ConfigError for categories of what is no dimension of its actions.
        """
        categories = getattr(config, "categories", self.categories)
        source = replace(self, rig=getattr(config, "rig", self.rig), categories=categories)
        if self.describe is not None:
            vectors = self.describe(input, config)
            period_ns = vectors.action_period_ns
            source = replace(source, vector_names=vectors.names, action_period_ns=period_ns, notes=vectors.notes)
        names = source.vector_names.get(Modality.ACTION.name, ())
        for name in source.categories:
            if name not in names:
                hint = did_you_mean(name, names) or ";"
                known = ", ".join(names) or "none"
                raise ConfigError(f"categories.{name}: the actions have no dimension {name}{hint} they have {known}")
        return source
