"""Names the kinds of things that a document is made of, and what each of them says of itself.

`Modality` counts the kinds there are: seven built in, and those that modules among a run's `extensions` register.
Arrays by modality are as long as ``len(Modality)``. A `ModalitySpec` says how one is planned, encoded and laid out;
those of the built-in ones are in `mmoe.modalities`, loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from mmoe.config.registry import is_same_class
from mmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

    from mmoe.schema.manifest import SegmentGroup, SourceManifest

MOST_MODALITIES = 255  # a modality is a byte of every position


class _Modalities(type):
    """Makes the class `Modality` a collection of its members, as an enumeration is."""

    _members: list[Modality]

    def __len__(cls) -> int:
        return len(cls._members)

    def __iter__(cls) -> Iterator[Modality]:
        return iter(cls._members)

    @property
    def names(cls) -> list[str]:
        """Name every modality, by its code."""
        return [member.name for member in cls._members]


class Modality(int, metaclass=_Modalities):
    """Names what a position holds, by its code. STRUCTURE marks the tokens between segments, and padding.

    The codes of the built-in ones never change; others are numbered as they are registered, which the `extensions` of a
    run decide. Raises ValueError for a code that there is not.
    """

    STRUCTURE: ClassVar[Modality]
    TEXT: ClassVar[Modality]
    VISION: ClassVar[Modality]
    AUDIO: ClassVar[Modality]
    INERTIAL: ClassVar[Modality]
    STATE: ClassVar[Modality]
    ACTION: ClassVar[Modality]
    _members: ClassVar[list[Modality]] = []

    name: str
    _spec: ModalitySpec | None

    def __new__(cls, code: int) -> Modality:
        """Give the one modality of this code."""
        if not 0 <= int(code) < len(cls._members):
            raise ValueError(f"{code} is not the code of a modality")
        return cls._members[int(code)]

    @classmethod
    def named(cls, name: str) -> Modality:
        """Find a modality by its name. Raises KeyError where there is none."""
        return {member.name: member for member in cls._members}[name]

    @classmethod
    def _add(cls, name: str, spec: ModalitySpec | None) -> Modality:
        member = super().__new__(cls, len(cls._members))
        member.name, member._spec = name, spec
        cls._members.append(member)
        return member

    @classmethod
    def register(cls, spec: ModalitySpec) -> Modality:
        """Register a modality from outside the package. Raises ConfigError where there is another of its name."""
        if spec.name in cls.names:
            known = cls.named(spec.name)
            if known._spec is None or not is_same_class(type(known._spec), type(spec)):
                raise ConfigError(f"there is a modality {spec.name} already; register it by another name")
            known._spec = spec  # its module was imported a second time
            return known
        if not spec.name.isidentifier() or spec.name != spec.name.upper():
            raise ConfigError(f"a modality cannot be named {spec.name!r}; give it a name in capitals, e.g. RANGE")
        others = [member.spec for member in cls if member is not cls.STRUCTURE]
        taken = [name for other in others for name in other.count_columns]
        if twice := [name for name in spec.count_columns if name in taken]:
            raise ConfigError(
                f"another modality than {spec.name} counts {twice[0]} already; give the count another name"
            )
        if len(cls) >= MOST_MODALITIES:
            raise ConfigError(f"there are {len(cls)} modalities, and no room for {spec.name}; register fewer")
        return cls._add(spec.name, spec)

    @property
    def spec(self) -> ModalitySpec:
        """Give what the modality says of itself; STRUCTURE, which no segment has, says nothing."""
        if self._spec is None:
            self._spec = importlib.import_module(f"mmoe.modalities.{self.name.lower()}").SPEC
        return self._spec

    def __repr__(self) -> str:
        return f"Modality.{self.name}"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        further = Modality._members[BUILT_IN:]
        return _found, (self.name, int(self), tuple(type(kind._spec).__module__ for kind in further))


def _found(name: str, code: int, modules: tuple[str, ...]) -> Modality:
    """The modality of this name, in a process that may not have imported yet what registers it and those before it."""
    for module in modules if name not in Modality.names else ():
        importlib.import_module(module)
    if name not in Modality.names or Modality.named(name) != code:
        raise ConfigError(
            f"modality {name} has code {code} in one process and not in another; register modalities when their module "
            "is imported, and name their modules in extensions in one order"
        )
    return Modality.named(name)


for _name in ("STRUCTURE", "TEXT", "VISION", "AUDIO", "INERTIAL", "STATE", "ACTION"):
    setattr(Modality, _name, Modality._add(_name, None))
BUILT_IN = len(Modality)
CONTRASTED = (Modality.TEXT, Modality.VISION, Modality.AUDIO)  # that a side of a contrastive pair can be of


def modality_tokens() -> tuple[str, ...]:
    """Name the further structure tokens of all modalities that are not built in."""
    return tuple(name for kind in Modality if kind >= BUILT_IN for name in kind.spec.tokens)


def check_known(names: Iterable[str], where: str) -> None:
    """Raises DataError for segments of a modality that nothing in this process has registered."""
    if missing := [name for name in names if name not in Modality.names]:
        raise DataError(
            f"{where} holds segments of modality {missing[0]}, which is not known here; name the module that registers "
            "it in extensions"
        )


def renumbered(codes: np.ndarray, names: list[str], where: str) -> np.ndarray:
    """Map codes that a file holds, u8 [n], to those of this process, by its `names` of those that are not built in.

    Raises DataError for a modality that nothing here has registered.
    """
    check_known(names, where)
    if not names:
        return codes
    table = np.arange(256, dtype=np.uint8)
    table[BUILT_IN : BUILT_IN + len(names)] = [Modality.named(name) for name in names]
    return table[codes]


@dataclass(frozen=True)
class Planned:
    """Says what n segments of one modality take in a sequence, known without decoding them: i64 [n] each.

    `tokens` are the positions of the payload, `around` those of the structure tokens that the layout puts around it.
    `labels` counts the positions that are targets of their own modality, `closing` (bool) says whether a structure
    token behind the payload is a target too. `columns` are the modality's `count_columns`.
    """

    tokens: np.ndarray
    around: np.ndarray
    labels: np.ndarray
    closing: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def without_targets(cls, tokens: np.ndarray, around: np.ndarray | int = 0, **columns: np.ndarray) -> Planned:
        """Plan payloads of so many positions, of which none is a target."""
        none = np.zeros(len(tokens), np.int64)
        return cls(tokens.astype(np.int64), none + around, none, none.astype(bool), columns)


class Payload(Protocol):
    """Holds a segment of a document that is being decoded, and what is shown of it."""

    @property
    def segment(self) -> np.void:
        """Give the segment as it was planned, `SEGMENT_DTYPE`."""

    @property
    def shown(self) -> np.void | None:
        """Give the segment whose content is shown: itself, another in its place, or None for nothing (blank)."""

    @property
    def source(self) -> str:
        """Name the source."""

    @property
    def where(self) -> str:
        """Say where the content lies, for messages."""

    @property
    def pair(self) -> int:
        """Give the contrastive pair that it is a side of, -1 for none."""

    def camera(self) -> int:
        """Give the camera's number in the run's rig; -1 for none."""

    def content(self) -> bytes:
        """Read the bytes of what is shown."""

    def images(self, least: tuple[int, int]) -> np.ndarray:
        """Decode the images that are shown, u8 [frames, H, W, 3], no smaller than `least` (rows, columns)."""

    def wave(self, rate: int) -> np.ndarray:
        """Decode the audio that is shown, f32 [samples] at `rate` Hz, as it is in its member resampled as a whole."""

    def table(self) -> np.ndarray:
        """Decode the table of readings that is shown, [rows, dimensions]."""


class ModalitySpec:
    """Says of one modality how it is planned, encoded, laid out and embedded; subclasses do.

    `name` is in capitals. `tokens` names further structure tokens that it needs, the one that stands where its vectors
    enter among them; `count_columns` what a plan counts of it beside positions and labels. Vectors take the place of
    their token's embedding, or are added to it where it `adds`. What cannot be read is counted under `refused_as`.
    """

    name: str
    tokens: tuple[str, ...] = ()
    count_columns: tuple[str, ...] = ()
    adds: bool = False
    refused_as: str = "unreadable payload"

    def vector_size(self, tokenizers: Any, manifests: Mapping[str, SourceManifest]) -> int:
        """Count the numbers of one of its vectors; 0 where its positions are ids alone, or no source has any."""
        return 0

    def check(self, segments: list[Any], content: bytes, where: str) -> None:
        """Check at preparation that training can decode a member and its segments. Raises DataError."""
        raise NotImplementedError

    def planned(self, segments: np.ndarray, tokenizers: Any, source: str) -> Planned:
        """Plan `segments`, `SEGMENT_DTYPE` [n] of this modality alone, of a source."""
        raise NotImplementedError

    def positions(self, group: SegmentGroup, tokenizers: Any, source: str) -> int:
        """Count the positions of a group of segments alike, with the structure tokens around them."""
        raise NotImplementedError

    def encode(self, payload: Payload, tokenizers: Any) -> Any:
        """Turn a payload into ids or vectors, as `layout` takes them; as many as were planned, whatever is shown."""
        raise NotImplementedError

    def layout(self, builder: Any, encoded: Any, payload: Payload) -> None:
        """Append what `encode` gave to a document by `mmoe.modalities.document.DocumentBuilder`."""
        raise NotImplementedError

    def embedding(self, vector_size: int, d_model: int) -> nn.Module:
        """Build the module that embeds its vectors, f32 [..., vector_size] -> [..., d_model]."""
        raise NotImplementedError
