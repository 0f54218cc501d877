"""Lays out one document: where every position, label, vector and span goes.

    text            bos TEXT eos
    dialogue        bos {TEXT, given or predicted} eos
    image, caption  bos image_start VISION image_end TEXT eos
    audio, text     bos audio_start AUDIO audio_end TEXT eos
    clip            bos video_start {slice} video_end eos
    slice           slice_start timestamp {cam_x VISION} audio_start AUDIO audio_end INERTIAL state
                    {action} action_end TEXT slice_end

The caption follows the action: it states what happens, so in front of it the action could be read off the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_CAMERA, NO_SLICE
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.tokenizers.vocabulary import Placeholder, Structure


@dataclass(frozen=True)
class PairSide:
    """Marks a side of a contrastive pair: [start, stop) in its document; `text_hash` names a TEXT side's caption."""

    pair: int
    start: int
    stop: int
    modality: Modality
    text_hash: int = 0


@dataclass(frozen=True)
class Document:
    """Holds a laid-out document of n positions; the fields are those of `PackedBatch`, per position [n]."""

    token_ids: np.ndarray
    modality: np.ndarray
    slice: np.ndarray
    position: np.ndarray  # [n, 3]
    camera: np.ndarray
    offset_ns: np.ndarray
    labels: np.ndarray
    # (pieces [.., D] that make the values [k, D], index [k]): joined once, where the batch needs them
    values: dict[Modality, tuple[list[np.ndarray], np.ndarray]]
    targets: dict[str, tuple[list[np.ndarray], np.ndarray]]  # by name, as `values`
    action_target: np.ndarray  # [m, H, A]
    action_mask: np.ndarray
    action_index: np.ndarray  # [m]
    spans: tuple[PairSide, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class DocumentBuilder:
    """Appends segments and structure tokens to a document; `finish` shifts the labels and returns it."""

    chunk: int
    action_dims: int
    camera_ids: np.ndarray  # token of each camera of the run
    further_ids: Mapping[str, int] = field(default_factory=dict)  # of structure tokens that only some runs have
    # length, modality, slice, camera, offset, predicted (this token is a target of the one before it)
    _runs: list[tuple[int, int, int, int, int, bool]] = field(default_factory=list)
    _ids: list[np.ndarray | list[int]] = field(default_factory=list)
    _places: list[np.ndarray | None] = field(default_factory=list)  # None: the next coordinates on all axes
    _own: list[tuple[int, np.ndarray]] = field(default_factory=list)  # labels that stand on the position itself
    _values: dict[Modality, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    _targets: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    _actions: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    _spans: list[PairSide] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)  # the first coordinate of each run
    _length: int = 0
    _next: int = 0  # next free coordinate on all three axes
    _slice_time: int | None = None  # time coordinate that the cameras of the current slice share
    _current_slice: int = NO_SLICE
    _stills: int = 0

    @classmethod
    def from_tokenizers(cls, tokenizers: Tokenizers) -> "DocumentBuilder":
        """Begin a document with the sizes and the further tokens of these tokenizers."""
        actions, further = tokenizers.dims[Modality.ACTION].size, tokenizers.vocabulary.further_ids
        return cls(tokenizers.config.action.chunk, actions, tokenizers.camera_ids, further)

    def structure(self, token: int, predicted: bool = False, offset_ns: int = 0) -> None:
        """Append a structure token; `predicted` where the model must learn to emit it (the end of a text or audio)."""
        self._append([token], Modality.STRUCTURE, predicted=predicted, offset_ns=offset_ns)

    def open_slice(self, number: int, timestamp_ns: int) -> None:
        """Append `slice_start timestamp`; every position until `close_slice` belongs to slice `number`."""
        self._current_slice, self._slice_time = number, None
        self.structure(Structure.SLICE_START)
        self.structure(Structure.TIMESTAMP, offset_ns=timestamp_ns)

    def close_slice(self, predicted: bool) -> None:
        """End the open slice by `slice_end`, which is a label where `predicted`."""
        self.structure(Structure.SLICE_END, predicted=predicted)
        self._current_slice, self._slice_time = NO_SLICE, None

    def image(self, patches: np.ndarray, positions: np.ndarray, pair: int) -> None:
        """Append a still image between its structure tokens, a slice of its own for the attention rule."""
        self.structure(Structure.IMAGE_START)
        self._current_slice, self._slice_time = self._stills, None
        self._stills += 1
        self._vision(patches, positions, NO_CAMERA, 0, pair)
        self._current_slice = NO_SLICE
        self.structure(Structure.IMAGE_END)

    def frame(self, patches: np.ndarray, positions: np.ndarray, camera: int, offset_ns: int, pair: int) -> None:
        """Append a camera of the open slice, by its number in the run's rig; all share the slice's time coordinate."""
        if camera != NO_CAMERA:
            self._append([self.camera_ids[camera]], Modality.STRUCTURE, camera=camera, offset_ns=offset_ns)
        self._vision(patches, positions, camera, offset_ns, pair)

    def audio(self, ids: np.ndarray, offset_ns: int, pair: int) -> None:
        """Append the codes of an audio clip, `ids` [n], between its structure tokens."""
        self.structure(Structure.AUDIO_START)
        self._span(pair, len(ids), Modality.AUDIO)
        self._append(ids, Modality.AUDIO, predicted=True, offset_ns=offset_ns)
        self.structure(Structure.AUDIO_END, predicted=len(ids) > 0)

    def text(self, ids: np.ndarray, pair: int, text_hash: int = 0, given: bool = False) -> None:
        """Append a text, `ids` [n], to be predicted or `given`; `text_hash` tells it from the texts of other pairs."""
        self._span(pair, len(ids), Modality.TEXT, text_hash)
        self._append(ids, Modality.TEXT, predicted=not given)

    def vectors(
        self,
        modality: Modality,
        token: int,
        values: np.ndarray,
        camera: int = NO_CAMERA,
        offset_ns: int = 0,
        place: np.ndarray | None = None,
    ) -> None:
        """Vectors [n, D] at n positions of `token`; `place` [n, 3] are their positions from 0, None one after another.

        What follows stands behind the furthest of them.
        """
        n = len(values)
        self._values.setdefault(modality, []).append((values, np.arange(self._length, self._length + n)))
        place = None if place is None else self._next + place
        self._append(np.full(n, token), modality, camera=camera, offset_ns=offset_ns, place=place)

    def target(self, name: str, values: np.ndarray) -> None:
        """Targets [n, D] of the loss term that reads them by `name`, of the n positions appended last.

        No target enters the input.
        """
        n = len(values)
        self._targets.setdefault(name, []).append((values, np.arange(self._length - n, self._length)))

    def action(self, target: np.ndarray, mask: np.ndarray, ids: np.ndarray, offset_ns: int) -> None:
        """Append a continuous chunk [H, A], predicted from the hidden state of one `action` token, and then `ids`.

        They are those of named values, as in `action_ids`.
        """
        self._actions.append((self._length, target, mask))
        self._own.append((self._length + 1, ids))
        self._append(np.full(1 + len(ids), Structure.ACTION), Modality.ACTION, offset_ns=offset_ns)
        self.structure(Structure.ACTION_END)

    def action_ids(self, ids: np.ndarray, offset_ns: int) -> None:
        """Discrete actions: one `action` token an element; its label (-100 for padding) is the element's id itself."""
        self._own.append((self._length, ids))
        self._append(np.full(len(ids), Structure.ACTION), Modality.ACTION, offset_ns=offset_ns)
        self.structure(Structure.ACTION_END)

    def finish(self) -> Document:
        """Build the document of all that was appended."""
        n = self._length
        ids = np.concatenate(self._ids).astype(np.int64, copy=False)
        runs = np.array(self._runs, np.int64)
        _, modality, slices, camera, offset_ns, predicted = np.repeat(runs, runs[:, 0], axis=0).T
        predicted = predicted.astype(bool)
        labels = np.full(n, IGNORE, np.int64)
        labels[:-1] = np.where(predicted[1:], ids[1:], IGNORE)
        labels[_between_vision(modality, slices)] = IGNORE
        for at, own in self._own:
            labels[at : at + len(own)] = own
        shape = (0, self.chunk, self.action_dims)
        return Document(
            token_ids=ids,
            modality=modality.astype(np.uint8),
            slice=slices.astype(np.int32),
            position=self._positions(runs[:, 0]),
            camera=camera.astype(np.int8),
            offset_ns=offset_ns,
            labels=labels,
            values={kind: _pieces(parts) for kind, parts in self._values.items()},
            targets={name: _pieces(parts) for name, parts in self._targets.items()},
            action_target=np.stack([t for _, t, _ in self._actions]) if self._actions else np.zeros(shape, np.float32),
            action_mask=np.stack([m for _, _, m in self._actions]) if self._actions else np.zeros(shape, bool),
            action_index=np.array([at for at, _, _ in self._actions], dtype=np.int64),
            spans=tuple(self._spans),
        )

    def _vision(self, patches: np.ndarray, positions: np.ndarray, camera: int, offset_ns: int, pair: int) -> None:
        n, start = len(patches), self._next
        if self._slice_time is None:
            self._slice_time = start
        place = start + positions
        place[:, 0] = self._slice_time + positions[:, 0]
        self._values.setdefault(Modality.VISION, []).append((patches, np.arange(self._length, self._length + n)))
        self._span(pair, n, Modality.VISION)
        ids = np.full(n, Placeholder.VISION)
        self._append(ids, Modality.VISION, camera=camera, offset_ns=offset_ns, place=place)

    def _span(self, pair: int, n: int, modality: Modality, text_hash: int = 0) -> None:
        if pair < 0 or n == 0:
            return
        start, stop = self._length, self._length + n
        last = self._spans[-1] if self._spans else None
        if last and last.pair == pair and last.modality == modality:  # the cameras of one slice are one side
            self._spans[-1] = PairSide(pair, last.start, stop, modality)
        else:
            self._spans.append(PairSide(pair, start, stop, modality, text_hash))

    def _append(
        self,
        ids: np.ndarray | list[int],
        modality: Modality,
        *,
        predicted: bool = False,
        camera: int = NO_CAMERA,
        offset_ns: int = 0,
        place: np.ndarray | None = None,
    ) -> None:
        n = len(ids)
        self._runs.append((n, int(modality), self._current_slice, int(camera), int(offset_ns), predicted))
        self._ids.append(ids)
        self._places.append(place)
        self._starts.append(self._next)
        self._length += n
        if n:
            self._next = self._next + n if place is None else max(self._next, int(place.max()) + 1)

    def _positions(self, lengths: np.ndarray) -> np.ndarray:
        """[n, 3] i32: ordinary runs count on from where they start; the others bring their own."""
        ends = np.cumsum(lengths)
        ordinary = np.arange(self._length) + np.repeat(np.array(self._starts) - (ends - lengths), lengths)
        positions = np.repeat(ordinary.astype(np.int32)[:, None], 3, axis=1)
        for end, place in zip(ends.tolist(), self._places):
            if place is not None:
                positions[end - len(place) : end] = place
        return positions


def _pieces(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray]:
    return [values for values, _ in parts], np.concatenate([index for _, index in parts])


def _between_vision(modality: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Positions from the first to the last VISION of a slice: under bidirectional slices they may see ahead."""
    inside = np.zeros(len(modality), bool)
    at = np.flatnonzero((modality == Modality.VISION) & (slices >= 0))
    if at.size:
        number = slices[at]
        order = np.argsort(number, kind="stable")
        _, first = np.unique(number[order], return_index=True)
        last = np.append(first[1:], at.size) - 1
        for a, b in zip(at[order][first], at[order][last]):
            inside[a : b + 1] = True
    return inside
