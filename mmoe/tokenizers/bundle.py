"""Builds the tokenizers of a run once, from the config and the manifests of its sources."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmoe.config.base import Config
from mmoe.errors import ConfigError
from mmoe.files import Read, read_file
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality, modality_tokens
from mmoe.schema.rig import Rig
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from mmoe.tokenizers.audio import AudioConfig
from mmoe.tokenizers.audio_codecs import load_codec
from mmoe.tokenizers.text import TextConfig, TextTokenizer
from mmoe.tokenizers.vectors import VectorNormalizer
from mmoe.tokenizers.vision import VisionConfig, VisionTokenizer
from mmoe.tokenizers.vocabulary import Vocabulary, further_cameras

VECTOR_MODALITIES = (Modality.ACTION, Modality.STATE, Modality.INERTIAL)
_VALUED = (Modality.VISION, Modality.INERTIAL, Modality.STATE)


class TokenizersConfig(Config):
    """Configures the tokenizers of all modalities."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    audio: AudioConfig | None = None  # null: no source of the run holds audio
    action: ActionConfig = ActionConfig()

    def build(self, manifests: dict[str, SourceManifest], read: Read = read_file) -> "Tokenizers":
        """Build the tokenizers of sources with these manifests; `read` reads their files, which may be far away."""
        return Tokenizers(self, manifests, read)


@dataclass(frozen=True)
class VectorDims:
    """Says where the dimensions of one source's vectors stand in the union over sources (by dimension name)."""

    names: tuple[str, ...]  # of the union
    columns: dict[str, np.ndarray]  # source -> columns of the union its dimensions take

    @property
    def size(self) -> int:
        """Count the dimensions of the union."""
        return len(self.names)


class Tokenizers:
    """Turns payloads into ids and vectors by pure functions; `sources` are numbered in the order of `manifests`.

    `rig` joins the rigs of the sources, and `cameras` maps the camera numbers of each source to those of `rig`.
    Raises ConfigError when a source holds audio and no audio codec is configured.
    """

    def __init__(self, config: TokenizersConfig, manifests: dict[str, SourceManifest], read: Read = read_file) -> None:
        self.config = config
        self.text: TextTokenizer = config.text.build(read)
        self.vision = VisionTokenizer(config.vision)
        self.audio = load_codec(config.audio, read) if config.audio is not None else None
        self.rig = Rig.union(manifest.rig for manifest in manifests.values())
        self.cameras = {name: self.rig.numbers(manifest.rig) for name, manifest in manifests.items()}
        self.categories = _categories(manifests)
        self.dims = {kind: _union(manifests, kind) for kind in VECTOR_MODALITIES}
        # Of STRUCTURE there are no segments; an action is a target, and no vector of the input.
        entering = [kind for kind in Modality if kind not in (Modality.STRUCTURE, Modality.ACTION)]
        sizes = {kind: kind.spec.vector_size(self, manifests) for kind in entering}
        self.value_dims = {kind: size for kind, size in sizes.items() if kind in _VALUED or size}
        self.actions: dict[str, ActionTokenizer] = {}
        self.normalizers: dict[tuple[str, Modality], VectorNormalizer] = {}
        if self.categories and not self.discrete_actions and not self.dims[Modality.ACTION].size:
            raise ConfigError(
                "tokenizers.action.mode is continuous, but no source has an action that is a number, only named "
                "values; set tokenizers.action.mode=discrete"
            )
        for name, manifest in manifests.items():
            if self.audio is None and _holds({name: manifest}, Modality.AUDIO):
                raise ConfigError(
                    f"tokenizers.audio is null, but source {name} holds audio; "
                    "name a codec in tokenizers.audio.path or drop the source"
                )
            for kind in VECTOR_MODALITIES:
                stats = manifest.vectors.get(kind.name)
                if stats is None:
                    continue
                if kind is Modality.ACTION:
                    self.actions[name] = ActionTokenizer(config.action, stats, manifest.categories)
                else:
                    self.normalizers[name, kind] = VectorNormalizer(stats)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Give the id space of these tokenizers."""
        return Vocabulary(
            text_size=self.text.size,
            audio_codebooks=self.audio.codebooks if self.audio else 0,
            audio_codebook_size=self.audio.codebook_size if self.audio else 0,
            action_bins=self.config.action.bins if self.discrete_actions else 0,
            further=(*further_cameras(self.rig), *modality_tokens()),
            categories=self.categories,
        )

    def category_ids(self, dimension: str, values: Iterable[str]) -> np.ndarray:
        """Return the ids of named values of a dimension of actions: i64 [values]."""
        first = self.vocabulary.ranges["category"].start
        return np.array([first + self.categories.index(f"{dimension}={value}") for value in values], np.int64)

    @cached_property
    def camera_ids(self) -> np.ndarray:
        """Give the id that announces each camera, by its number in `rig`: i64 [cameras]."""
        return self.vocabulary.camera_ids(self.rig)

    @property
    def discrete_actions(self) -> bool:
        """Say whether actions are ids of bins."""
        return self.config.action.mode == "discrete"


def _holds(manifests: dict[str, SourceManifest], kind: Modality) -> bool:
    return any(split.segments(kind.name) for m in manifests.values() for split in m.splits.values())


def _categories(manifests: dict[str, SourceManifest]) -> tuple[str, ...]:
    """The named values of all sources, as the vocabulary has them: of one dimension together."""
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests.values():
        for dimension, values in manifest.categories.items():
            found.setdefault(dimension, {}).update(dict.fromkeys(values))
    for source, manifest in manifests.items():
        stats = manifest.vectors.get(Modality.ACTION.name)
        if mixed := [name for name in found if stats and name in stats.names and name not in manifest.categories]:
            raise ConfigError(
                f"{mixed[0]} is a number in the actions of source {source}, and a named value in those of another; "
                "prepare both with the same option categories"
            )
    return tuple(f"{dimension}={value}" for dimension, values in found.items() for value in values)


def _union(manifests: dict[str, SourceManifest], kind: Modality) -> VectorDims:
    held: dict[str, list[str]] = {}
    for source, manifest in manifests.items():
        if kind.name in manifest.vectors:
            named = manifest.categories if kind is Modality.ACTION else {}
            held[source] = [name for name in manifest.vectors[kind.name].names if name not in named]
    names = list(dict.fromkeys(name for mine in held.values() for name in mine))
    columns = {source: np.array([names.index(n) for n in mine], dtype=np.int64) for source, mine in held.items()}
    return VectorDims(tuple(names), columns)
