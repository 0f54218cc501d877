"""Random multimodal documents, packed into a `PackedBatch` or one to a sequence.

Written from the layouts and label rule of the design alone, without the package's own packer.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mmoe.models.embeddings import ModelInputs
from mmoe.schema.batch import IGNORE, PackedBatch, Pairs, Values
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD
from mmoe.tokenizers.vocabulary import Placeholder, Structure, Vocabulary

VOCABULARY = Vocabulary(text_size=40, audio_codebooks=2, audio_codebook_size=8, action_bins=5)
DIMS = {Modality.VISION: 12, Modality.INERTIAL: 6, Modality.STATE: 5}
ACTION_SHAPE = (3, 2)
SOURCES = 3
INPUTS = ModelInputs(
    vocabulary_size=VOCABULARY.size,
    patch_dim=DIMS[Modality.VISION],
    inertial_dim=DIMS[Modality.INERTIAL],
    state_dim=DIMS[Modality.STATE],
    action_chunk=ACTION_SHAPE[0],
    action_dim=ACTION_SHAPE[1],
)
CAMERA_IDS = VOCABULARY.camera_ids(STANDARD)
TEXT, AUDIO = VOCABULARY.ranges["text"], VOCABULARY.ranges["audio"]


@dataclass
class Document:
    """Rows of (token, modality, slice, position, camera, offset_ns, predicted), and what stands beside them."""

    source: int
    rows: list[tuple] = field(default_factory=list)
    values: list[tuple[Modality, int, np.ndarray]] = field(default_factory=list)
    actions: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    bins: dict[int, int] = field(default_factory=dict)  # labels that stand on discrete `action` tokens
    spans: list[tuple[int, Modality, int, int]] = field(default_factory=list)
    after: int = 0  # next free coordinate

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, token, modality=Modality.STRUCTURE, slice=-1, camera=-1, offset=0, predicted=False, place=None):
        place = (self.after,) * 3 if place is None else place
        self.rows.append((int(token), int(modality), slice, place, camera, offset, predicted))
        self.after = max(self.after, *place) + (1 if place == (self.after,) * 3 else 0)

    @property
    def labels(self) -> np.ndarray:
        labels = np.full(len(self), IGNORE, np.int64)
        for i, row in enumerate(self.rows[1:]):
            if row[6]:
                labels[i] = row[0]
        modality, slices = (np.array([row[k] for row in self.rows]) for k in (1, 2))
        for number in set(slices[slices >= 0]):
            vision = np.flatnonzero((slices == number) & (modality == Modality.VISION))
            if len(vision):
                labels[vision[0] : vision[-1] + 1] = IGNORE
                labels[max(vision[0] - 1, 0)] = IGNORE
        for at, label in self.bins.items():
            labels[at] = label
        return labels


def random_document(rng: np.random.Generator, kind: str, pair: int = -1, discrete: bool = False) -> Document:
    """`kind`: text, image, audio or clip. With `pair` >= 0 its text (or images, or audio) is a side of it."""
    doc = Document(source=int(rng.integers(SOURCES)))
    doc.add(Structure.BOS)

    def ids(allowed, modality, slice=-1, offset=0, low=1):
        start = len(doc)
        for token in rng.choice(np.arange(allowed.start, allowed.stop), rng.integers(low, 7)):
            doc.add(token, modality, slice, offset=offset, predicted=True)
        if pair >= 0 and (modality == Modality.AUDIO or kind == "text"):
            doc.spans.append((pair, modality, start, len(doc)))

    def image(slice, origin, camera=-1, offset=0):
        height, width = rng.integers(1, 4, 2)
        for row, column in np.ndindex(height, width):
            doc.values.append((Modality.VISION, len(doc), rng.normal(size=DIMS[Modality.VISION])))
            place = (origin, doc_origin[0] + int(row), doc_origin[0] + int(column))
            doc.add(Placeholder.VISION, Modality.VISION, slice, camera, offset, place=place)
        doc.after = max(max(row[3]) for row in doc.rows) + 1

    def vector(kind_, token, slice, offset):
        doc.values.append((kind_, len(doc), rng.normal(size=DIMS[kind_])))
        doc.add(token, kind_, slice, offset=offset)

    doc_origin = [0]
    if kind == "text":
        ids(TEXT, Modality.TEXT)
    elif kind == "image":
        for number in range(rng.integers(1, 3)):
            doc.add(Structure.IMAGE_START)
            doc_origin[0], start = doc.after, len(doc)
            image(number, doc.after)
            if pair >= 0:
                doc.spans.append((pair, Modality.VISION, start, len(doc)))
                pair = -1
            doc.add(Structure.IMAGE_END)
        ids(TEXT, Modality.TEXT)
    elif kind == "audio":
        doc.add(Structure.AUDIO_START)
        ids(AUDIO, Modality.AUDIO)
        doc.add(Structure.AUDIO_END, predicted=True)
        ids(TEXT, Modality.TEXT)
    else:
        doc.add(Structure.VIDEO_START)
        for number in range(rng.integers(1, 4)):
            doc.add(Structure.SLICE_START, slice=number)
            doc.add(Structure.TIMESTAMP, slice=number, offset=int(rng.integers(1, 10**10)))
            origin, start = None, len(doc)
            for camera in range(rng.integers(1, len(STANDARD.cameras) + 1)):
                offset = int(rng.integers(-(10**7), 10**7))
                doc.add(CAMERA_IDS[camera], slice=number, camera=camera, offset=offset)
                origin = doc.after if origin is None else origin
                doc_origin[0] = doc.after
                image(number, origin, camera, offset)
            if pair >= 0 and number == 0:
                doc.spans.append((pair, Modality.VISION, start, len(doc)))
            if rng.random() < 0.5:
                doc.add(Structure.AUDIO_START, slice=number)
                for token in rng.choice(np.arange(AUDIO.start, AUDIO.stop), 3):
                    doc.add(token, Modality.AUDIO, number, offset=-500, predicted=True)
                doc.add(Structure.AUDIO_END, slice=number, predicted=True)
            vector(Modality.INERTIAL, Placeholder.INERTIAL, number, 10**6)
            vector(Modality.STATE, Structure.STATE, number, -(10**6))
            if discrete:
                for bin in rng.choice(np.arange(*_bounds("action")), 4):
                    doc.bins[len(doc)] = int(bin)
                    doc.add(Structure.ACTION, Modality.ACTION, number)
            else:
                mask = rng.random(ACTION_SHAPE) < 0.8
                doc.actions.append((len(doc), rng.normal(size=ACTION_SHAPE), mask))
                doc.add(Structure.ACTION, Modality.ACTION, number)
            doc.add(Structure.ACTION_END, slice=number)
            for token in rng.choice(np.arange(TEXT.start, TEXT.stop), rng.integers(1, 4)):
                doc.add(token, Modality.TEXT, number, predicted=True)
            doc.add(Structure.SLICE_END, slice=number, predicted=True)
        doc.add(Structure.VIDEO_END)
    doc.add(Structure.EOS, predicted=kind != "clip")
    return doc


def _bounds(name: str) -> tuple[int, int]:
    ids = VOCABULARY.ranges[name]
    return ids.start, ids.stop


def random_sequences(seed: int, sequences: int, documents: int, discrete: bool = False) -> list[list[Document]]:
    """`documents` or one more in each sequence; most other documents are one side of a pair of neighbors."""
    rng = np.random.default_rng(seed)
    packed, pair = [], 0
    for _ in range(sequences):
        sequence: list[Document] = []
        while len(sequence) < documents:
            kind = rng.choice(["text", "image", "audio", "clip"])
            if kind != "text" and rng.random() < 0.7:
                sequence.append(random_document(rng, kind, pair, discrete))
                sequence.append(random_document(rng, "text", pair))
                pair += 1
            else:
                sequence.append(random_document(rng, kind, discrete=discrete))
        packed.append(sequence)
    return packed


def pack(sequences: list[list[Document]], length: int | None = None, spare_values: int = 3) -> PackedBatch:
    """A PackedBatch of `length` positions a sequence (default: 5 more than the fullest needs)."""
    length = length or 5 + max(sum(map(len, sequence)) for sequence in sequences)
    B = len(sequences)
    fields = {
        "token_ids": np.full((B, length), Structure.PAD, np.int64),
        "modality": np.zeros((B, length), np.uint8),
        "slice": np.full((B, length), -1, np.int32),
        "position": np.zeros((B, length, 3), np.int32),
        "camera": np.full((B, length), -1, np.int8),
        "offset_ns": np.zeros((B, length), np.int64),
    }
    document, source = np.full((B, length), -1, np.int32), np.full((B, length), -1, np.int16)
    labels = np.full((B, length), IGNORE, np.int64)
    values = {kind: ([], []) for kind in DIMS}
    actions, sides, borders, origin = [], {}, [0], []
    for b, sequence in enumerate(sequences):
        at = 0
        origin.append([(doc.source, 0, row, 0) for row, doc in enumerate(sequence)])
        for number, doc in enumerate(sequence):
            here, flat = np.s_[b, at : at + len(doc)], b * length + at
            for column, name in enumerate(fields):
                fields[name][here] = np.array([row[column] for row in doc.rows])
            document[here], source[here], labels[here] = number, doc.source, doc.labels
            for kind, index, vector in doc.values:
                values[kind][0].append(vector)
                values[kind][1].append(flat + index)
            actions += [(flat + index, target, mask) for index, target, mask in doc.actions]
            for pair, modality, start, stop in doc.spans:
                sides.setdefault((b, pair), []).append((flat + start, flat + stop, int(modality)))
            at += len(doc)
            borders.append(b * length + at)
        if at < length:
            borders.append((b + 1) * length)
    pairs = [side for side in sides.values() if len(side) == 2]
    return PackedBatch(
        **{name: torch.from_numpy(array) for name, array in fields.items()},
        document=torch.from_numpy(document),
        source=torch.from_numpy(source),
        labels=torch.from_numpy(labels),
        loss_weight=torch.from_numpy((labels >= 0).astype(np.float32)),
        values={kind: _values(kind, *values[kind], spare_values) for kind in DIMS},
        action_target=_stack([a[1] for a in actions], (0, *ACTION_SHAPE), np.float32),
        action_mask=_stack([a[2] for a in actions], (0, *ACTION_SHAPE), bool),
        action_index=torch.tensor([a[0] for a in actions], dtype=torch.int64),
        pairs=Pairs(
            span=torch.tensor([[s[:2] for s in pair] for pair in pairs], dtype=torch.int64).reshape(-1, 2, 2),
            modality=torch.tensor([[s[2] for s in pair] for pair in pairs], dtype=torch.uint8).reshape(-1, 2),
            text_hash=torch.arange(len(pairs)),
            group=torch.zeros(len(pairs), dtype=torch.int64),
        ),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        documents=origin,
    )


def random_batch(seed: int, sequences: int = 2, documents: int = 4, discrete: bool = False) -> PackedBatch:
    """Packed, with a padding tail of at least 5 positions in each sequence."""
    return pack(random_sequences(seed, sequences, documents, discrete))


def text_batch(ids: list[list[list[int]]], length: int) -> PackedBatch:
    """Plain text: `ids[b][d]` are the token ids of document d of sequence b."""
    sequences = []
    for sequence in ids:
        documents = []
        for tokens in sequence:
            doc = Document(source=0)
            for token in tokens:
                doc.add(token, Modality.TEXT, predicted=True)
            documents.append(doc)
        sequences.append(documents)
    return replace(pack(sequences, length), values={})


def _values(kind: Modality, vectors: list[np.ndarray], index: list[int], spare: int) -> Values:
    rows = np.zeros((len(vectors) + spare, DIMS[kind]), np.float32)
    rows[: len(vectors)] = np.array(vectors).reshape(-1, DIMS[kind])
    return Values(torch.from_numpy(rows), torch.tensor(index + [-1] * spare, dtype=torch.int64))


def _stack(arrays: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(dtype) if arrays else np.zeros(empty, dtype))
