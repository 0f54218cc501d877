"""Collate laid-out documents into a `PackedBatch`."""

import numpy as np
import torch

from mmoe.data.load.workers import is_worker
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import ConfigError
from mmoe.modalities.document import Document
from mmoe.runtime.memory import free_memory, in_gib
from mmoe.schema.batch import IGNORE, PackedBatch, Pairs, Values
from mmoe.schema.modality import Modality
from mmoe.schema.quarantined import Quarantined
from mmoe.schema.sample import NO_CAMERA, NO_SLICE
from mmoe.tokenizers.vocabulary import Structure, Vocabulary

_POSITION_BYTES = 64  # of all fields of a position, labels and provenance among them


class Collator:
    """Packs B sequences of documents into tensors of fixed shape [B, length].

    `dims` is the vector size by continuous modality; `patches` rows of VISION values are reserved a sequence.
    `weights` [modalities] is the loss weight of a label by the modality of its target.
    """

    def __init__(
        self,
        length: int,
        patches: int,
        dims: dict[Modality, int],
        action_shape: tuple[int, int],
        vocabulary: Vocabulary,
        weights: np.ndarray,
    ) -> None:
        self.length, self.patches, self.dims, self.action_shape = length, patches, dims, action_shape
        self.vocabulary, self.weights = vocabulary, weights.astype(np.float32)

    def __call__(
        self,
        sequences: list[list[tuple[DocumentRef, list[Document] | int]]],
        groups: list[int],
        quarantined: tuple[Quarantined, ...] = (),
    ) -> PackedBatch:
        """Pack sequences of laid-out documents into one batch.

        Sequence b is of contrastive group ``groups[b]``. In place of a part's documents, a number is the positions
        that stay padding.
        """
        B, L = len(sequences), self.length
        token_ids = np.full((B, L), Structure.PAD, np.int64)
        modality = np.zeros((B, L), np.uint8)
        document = np.full((B, L), -1, np.int32)
        slices = np.full((B, L), NO_SLICE, np.int32)
        position = np.zeros((B, L, 3), np.int32)
        camera = np.full((B, L), NO_CAMERA, np.int8)
        offset = np.zeros((B, L), np.int64)
        source = np.full((B, L), -1, np.int16)
        labels = np.full((B, L), IGNORE, np.int64)
        values: dict[Modality, list[tuple[list[np.ndarray], np.ndarray]]] = {kind: [] for kind in self.dims}
        targets: dict[str, list[tuple[list[np.ndarray], np.ndarray]]] = {}
        actions: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        pairs: list[tuple[list[tuple[int, int]], list[int], int, int]] = []
        borders, provenance = [0], []
        for b, sequence in enumerate(sequences):
            at, number, origin = 0, 0, []
            for ref, documents in sequence:
                if isinstance(documents, int):
                    at += documents
                    borders.append(b * L + at)
                    continue
                sides: dict[int, list[tuple[int, int, int, int]]] = {}
                for item in documents:
                    n, flat = len(item), b * L + at
                    here = slice(at, at + n)
                    token_ids[b, here], modality[b, here] = item.token_ids, item.modality
                    document[b, here], slices[b, here] = number, item.slice
                    position[b, here], camera[b, here] = item.position, item.camera
                    offset[b, here], source[b, here], labels[b, here] = (
                        item.offset_ns,
                        ref.source,
                        item.labels,
                    )
                    for kind, (vectors, index) in item.values.items():
                        if kind not in self.dims:
                            raise ConfigError(f"modality {kind.name} lays out vectors, but its vector_size is 0")
                        values[kind].append((vectors, index + flat))
                    for name, (vectors, index) in item.targets.items():
                        targets.setdefault(name, []).append((vectors, index + flat))
                    if len(item.action_index):
                        actions.append((item.action_target, item.action_mask, item.action_index + flat))
                    for span in item.spans:
                        side = (flat + span.start, flat + span.stop, span.modality, span.text_hash)
                        sides.setdefault(span.pair, []).append(side)
                    borders.append(flat + n)
                    origin.append((ref.source, ref.shard, ref.row, ref.part))
                    at, number = at + n, number + 1
                for spans in sides.values():
                    if len(spans) == 2:
                        digest = next(s[3] for s in spans if s[2] == Modality.TEXT)
                        pairs.append(([s[:2] for s in spans], [s[2] for s in spans], digest, groups[b]))
            if at < L:
                borders.append((b + 1) * L)
            provenance.append(origin)
        weight = np.where(labels >= 0, self.weights[self.vocabulary.modality_of(np.maximum(labels, 0))], 0.0)
        H, A = self.action_shape
        return PackedBatch(
            token_ids=torch.from_numpy(token_ids),
            modality=torch.from_numpy(modality),
            document=torch.from_numpy(document),
            slice=torch.from_numpy(slices),
            position=torch.from_numpy(position),
            camera=torch.from_numpy(camera),
            offset_ns=torch.from_numpy(offset),
            source=torch.from_numpy(source),
            labels=torch.from_numpy(labels),
            loss_weight=torch.from_numpy(weight.astype(np.float32)),
            values={
                kind: _joined(parts, self.dims[kind], self.patches * B if kind is Modality.VISION else 0)
                for kind, parts in values.items()
                if self.dims[kind]
            },
            targets={name: _joined(parts, parts[0][0][0].shape[1]) for name, parts in targets.items()},
            action_target=_stack([a[0] for a in actions], (0, H, A), np.float32),
            action_mask=_stack([a[1] for a in actions], (0, H, A), bool),
            action_index=_stack([a[2] for a in actions], (0,), np.int64),
            pairs=Pairs(
                span=torch.tensor([p[0] for p in pairs], dtype=torch.int64).reshape(-1, 2, 2),
                modality=torch.tensor([p[1] for p in pairs], dtype=torch.uint8).reshape(-1, 2),
                text_hash=torch.tensor([p[2] for p in pairs], dtype=torch.int64),
                group=torch.tensor([p[3] for p in pairs], dtype=torch.int64),
            ),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            documents=provenance,
            quarantined=quarantined,
        )

    def size(self, sequences: int) -> int:
        """Return the bytes of a batch of so many sequences, without what is rare in it."""
        return sequences * (self.length * _POSITION_BYTES + self.patches * (4 * self.dims[Modality.VISION] + 8))

    def check_room(self, sequences: int, workers: int, prefetch: int) -> None:
        """Raise ConfigError where the batches that are held at a time do not fit the free memory."""
        held = workers * prefetch + 1
        needed, free = held * self.size(sequences), free_memory()
        if needed > free:
            raise ConfigError(
                f"{held} batches of {sequences} sequences of data.sequence_length {self.length} with {self.patches} "
                f"patches each take {in_gib(needed)}, and {in_gib(free)} are free; lower data.workers, data.prefetch, "
                "data.sequence_length, data.patches_per_sequence or training.micro_batch_sequences"
            )


def _joined(parts: list[tuple[list[np.ndarray], np.ndarray]], size: int, least: int = 0) -> Values:
    """One table of the vectors, `size` numbers each, with `least` rows at least."""
    count = sum(len(index) for _, index in parts)
    rows = max(count, least)
    tensor = _handed_over((rows, size))
    vectors, index, at = tensor.numpy(), np.full(rows, -1, np.int64), 0
    for pieces, where in parts:
        index[at : at + len(where)] = where
        for piece in pieces:
            if piece.shape[1] != size:
                raise ConfigError(f"vectors of {piece.shape[1]} numbers were laid out where {size} are planned")
            vectors[at : at + len(piece)] = piece
            at += len(piece)
    vectors[count:] = 0
    return Values(tensor, torch.from_numpy(index))


def _handed_over(shape: tuple[int, int]) -> torch.Tensor:
    """An empty f32 tensor, in a worker in the memory that is handed to the training process: the patches of a batch
    are tens of megabytes, so every byte is written once."""
    if not is_worker():
        return torch.empty(shape)
    size = shape[0] * shape[1] * torch.float32.itemsize
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(size)).resize_(shape) if size else torch.empty(shape)


def _stack(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype))
