"""Cuts robot episodes into clips: rows at a fixed rate, each with images, a state and the commanded action.

An episode is one recording. It is cut into clips of a few time slices, each slice the row it falls on; clips share
no slice. Nothing of a clip reaches outside its episode: where fewer rows than an action chunk are left, the table
ends with the episode, and the rest of the chunk is padding, which is not trained on. Clip time starts at the clip's
first slice. The rows' times are made by a writer (row / rate), so the clock is synthetic.

Members: ``<view>-<slice>.<suffix>`` the images, ``state.npy`` [N, D], ``actions.npy`` [N, A] f32 (with the row
before the clip, the action last taken, and up to `lookahead` rows after it), ``txt`` the instruction,
``clocks.npz``. The instruction stands before the action of the slice in which it begins to hold: the action follows
from it. It is not paired with the images, or packing would hide it from the actions.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.data.load.media import image_format, image_size
from mmoe.errors import ConfigError, Refused
from mmoe.preparation.clocks import SkewPolicy
from mmoe.preparation.slices import CLOCKS, Clocks, ReadingChoice, SensorStream, build_slices
from mmoe.preparation.sources.encode import encode_table
from mmoe.preparation.sources.jsonl import encode_text
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig
from mmoe.schema.sample import NO_CAMERA, Sample, Segment


class EpisodeConfig(Config):
    """Says how any source of episodes is cut, and which camera of a rig took each of its views."""

    rig: Rig = STANDARD
    cameras: dict[str, str | None] | None = None  # by view, the camera whose token and embedding it takes; null: none
    slices: int = Field(10, ge=1)  # time slices of a clip
    rows_per_slice: int = Field(1, ge=1)  # from one time slice to the next
    lookahead: int = Field(50, ge=0)  # rows after a clip's last slice in its action table
    # By dimension of the action whose numbers 0, 1, ... are no quantities, what they mean: {"button": [none, A, B]}.
    categories: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _different(self) -> "EpisodeConfig":
        for dimension, values in self.categories.items():
            if len(set(values)) < max(2, len(values)):
                raise ValueError(f"categories.{dimension}: give two or more names, all different, not {list(values)}")
        return self

    @model_validator(mode="after")
    def _in_the_rig(self) -> "EpisodeConfig":
        for view, name in (self.cameras or {}).items():
            try:
                self.rig.number(name)
            except ConfigError as error:
                raise ValueError(f"cameras.{view}: {error}") from None
        return self


@dataclass(frozen=True)
class View:
    """Holds the images of one camera, as encoded bytes of each of R slice rows.

    `file_ns` [R] is when its file says they were.
    """

    name: str  # as a member's name begins
    suffix: str
    images: list[bytes]
    camera: int = NO_CAMERA
    file_ns: np.ndarray | None = None


@dataclass(frozen=True)
class Episode:
    """Holds the N rows of an episode: `times_ns` [N] from its start, `tables` [N, D] by STATE and ACTION, `texts` [N].

    D is the number of dimensions of a table. A table of actions may end before the episode does.
    """

    name: str
    times_ns: np.ndarray
    tables: dict[Modality, np.ndarray]
    texts: list[str] = field(default_factory=list)  # the instruction that holds at each row


def stored_kind(images: list[bytes], where: str) -> str:
    """Return the suffix of a view's images as they are stored, one for all; raise DataError where there is none."""
    kinds = {image_format(image, where) for image in images}
    if len(kinds) > 1:
        raise Refused("unreadable image or video", f"{where}: images of kinds {sorted(kinds)}; store one kind")
    return kinds.pop()


def windows(rows: int, config: EpisodeConfig) -> Iterator[range]:
    """Yield the slice rows of each clip of an episode of so many rows."""
    chosen = range(0, rows, config.rows_per_slice)
    for first in range(0, len(chosen), config.slices):
        yield chosen[first : first + config.slices]


def clip(key: str, episode: Episode, rows: range, views: list[View], config: EpisodeConfig, where: str) -> Sample:
    """Make the sample of the slices at `rows`; every view has an image of each of them."""
    origin_ns = int(episode.times_ns[rows[0]])
    episode_ns = episode.times_ns - origin_ns
    reference_ns = episode_ns[list(rows)]
    members: dict[str, bytes] = {}
    streams = []
    for view in views:
        names = [f"{view.name}-{number}.{view.suffix}" for number in range(len(rows))]
        members.update(zip(names, view.images, strict=True))
        sizes = [image_size(image, f"{where}, {view.name}") for image in view.images]
        file_ns = None if view.file_ns is None else view.file_ns - origin_ns
        streams.append(
            SensorStream(
                view.name, Modality.VISION, reference_ns, names, 0, camera=view.camera, size=sizes, file_ns=file_ns
            )
        )
    first, last = max(rows[0] - 1, 0), min(rows[-1] + 1 + config.lookahead, len(episode_ns))
    spans = {Modality.STATE: (rows[0], rows[-1] + 1), Modality.ACTION: (first, last)}
    for modality, table in episode.tables.items():
        start, stop = spans[modality][0], min(spans[modality][1], len(table))
        if start >= stop:
            continue  # the last action came before
        member = {Modality.STATE: "state.npy", Modality.ACTION: "actions.npy"}[modality]
        members[member] = encode_table(table[start:stop])
        choice: ReadingChoice = "first" if modality is Modality.ACTION else "last"
        streams.append(
            SensorStream(modality.name.lower(), modality, episode_ns[start:stop], member, max_gap_ns=0, choice=choice)
        )
    slices = build_slices(reference_ns, streams, SkewPolicy(budget_ns=0), where)
    texts = {int(episode_ns[row]): episode.texts[row] for row in rows} if episode.texts else {}
    segments, flags = _instructed(slices.segments, texts), slices.flags + Counter()
    spoken = list(dict.fromkeys(segment.text for segment in segments if segment.modality is Modality.TEXT))
    if spoken:
        members["txt"] = encode_text("\n".join(spoken), where)
    else:
        flags["instruction: absent"] += 1
    times_ns = {stream.name: episode_ns for stream in streams}
    members[CLOCKS] = Clocks(episode.name, "synthetic", streams[0].name, times_ns, origin_ns).to_bytes()
    return Sample(key, episode.name, members, segments, flags)


def _instructed(segments: list[Segment], texts: dict[int, str]) -> list[Segment]:
    """The segments with each instruction in the slice where it begins to hold, before the action.

    `texts` maps a slice's time to what holds then; blank where nothing was said.
    """
    done: list[Segment] = []
    said = None
    for at, segment in enumerate(segments):
        last = at + 1 == len(segments) or segments[at + 1].slice != segment.slice
        acts = segment.modality is Modality.ACTION
        text = texts.get(segment.timestamp_ns, "")
        if not (acts or last) or text == said or not text.strip():
            done.append(segment)
            continue
        said = text
        place = {"slice": segment.slice, "timestamp_ns": segment.timestamp_ns}
        words = Segment(Modality.TEXT, "txt", text=text, **place)
        done += [words, segment] if acts else [segment, words]
    return done
