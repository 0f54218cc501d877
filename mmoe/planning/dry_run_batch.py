"""Makes what a dry run is given in place of data: sizes of the model's inputs, and a full batch of stated documents."""

from dataclasses import dataclass

import numpy as np
import torch

from mmoe.data.config import DataConfig
from mmoe.data.storage.store import DEFAULT_STORAGE
from mmoe.errors import ConfigError
from mmoe.models.embeddings import ModelInputs
from mmoe.schema.batch import IGNORE, PackedBatch, Pairs, Values
from mmoe.schema.counts import ACTION_ELEMENTS, COST, PAIRS, PATCHES, POSITIONS, Counts, labels, zeros
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD
from mmoe.schema.sample import NO_CAMERA, NO_SLICE
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.vision import VisionTokenizer
from mmoe.tokenizers.vocabulary import Placeholder, Structure, Vocabulary

VOCABULARY = 131_072
DIMENSIONS = {Modality.INERTIAL: 6, Modality.STATE: 8, Modality.ACTION: 8}


@dataclass(frozen=True)
class Assumed:
    """Holds what the data of so many `sources` would say, were it there.

    Every modality occurs, with the sizes `DIMENSIONS`.
    """

    inputs: ModelInputs
    vocabulary: Vocabulary
    sources: int

    @classmethod
    def from_config(cls, tokenizers: TokenizersConfig, sources: int, vocabulary_size: int | None) -> "Assumed":
        """Assume sizes for so many `sources` and `vocabulary_size` ids.

        None stands for the ids that the text tokenizer has where its file exists, else 131,072 in all.
        """
        bins = tokenizers.action.bins if tokenizers.action.mode == "discrete" else 0
        text = tokenizers.text
        if vocabulary_size is None and (text.path is None or DEFAULT_STORAGE.exists(text.path)):
            vocabulary = Vocabulary(text.build().size, action_bins=bins)
        else:
            others = Vocabulary(0, action_bins=bins).size
            vocabulary = Vocabulary((vocabulary_size or VOCABULARY) - others, action_bins=bins)
        dims = {Modality.VISION: VisionTokenizer(tokenizers.vision).vector_dim, **DIMENSIONS}
        inputs = ModelInputs.from_data(vocabulary.size, dims, tokenizers.action, len(STANDARD.cameras))
        return cls(inputs, vocabulary, sources)

    def sentence(self) -> str:
        """Return a sentence that says the assumed sizes."""
        inputs = self.inputs
        return (
            f"vocabulary {inputs.vocabulary_size:,}, patches of {inputs.patch_dim} + {inputs.patch_coordinates} "
            f"numbers, inertial {inputs.inertial_dim}, state {inputs.state_dim}, actions {inputs.action_chunk} x "
            f"{inputs.action_dim}"
        )


@dataclass(frozen=True)
class Documents:
    """Describes a batch in which `count` equally long documents fill each of `sequences` of `length` positions.

    Each has an image of `patches`, an inertial, a state and an action vector, and labeled text. The image and the
    text are a contrastive pair.
    """

    sequences: int
    length: int
    count: int
    patches: int
    patch_budget: int  # vectors that a sequence's share of a batch has room for

    @classmethod
    def from_config(cls, data: DataConfig, max_patches: int, sequences: int, count: int) -> "Documents":
        """Fill `sequences` with `count` documents each, whose images have `max_patches` at most.

        Raises ConfigError where so many documents do not fill a sequence.
        """
        length = data.sequence_length
        if length % count or length // count < 16:
            raise ConfigError(
                f"--documents is {count}, but data.sequence_length {length} must be so many documents of equally many "
                "positions, 16 at least; choose a smaller divisor"
            )
        patches = min(max_patches, length // count // 2, data.patch_budget // count)
        return cls(sequences, length, count, patches, data.patch_budget)

    @property
    def size(self) -> int:
        """The number of positions in a document."""
        return self.length // self.count

    @property
    def labels(self) -> int:
        """The number of labels in one sequence."""
        return self.count * (self.size - self.patches - 4)

    def sentence(self) -> str:
        """Return a sentence that says what documents fill a sequence."""
        return (
            f"{self.count} document{'s' * (self.count > 1)} of {self.size:,} positions a sequence, without padding: "
            f"{self.patches} patches, 3 vectors and {self.labels // self.count:,} labels each"
        )

    def counts(self, steps_sequences: int, assumed: Assumed) -> Counts:
        """Count what a step of `steps_sequences` sequences holds."""
        inputs, documents = assumed.inputs, steps_sequences * self.count
        columns = zeros()
        columns[[POSITIONS, PATCHES, PAIRS]] = steps_sequences * self.length, documents * self.patches, documents
        columns[ACTION_ELEMENTS] = documents * inputs.action_chunk * inputs.action_dim
        columns[COST] = documents * self.size**2
        columns[labels()][Modality.TEXT] = steps_sequences * self.labels
        return Counts(columns)

    def batch(self, assumed: Assumed) -> PackedBatch:
        """Make the batch of these documents."""
        size, patches, documents = self.size, self.patches, self.sequences * self.count
        text = assumed.vocabulary.ranges["text"]
        modality = np.full(size, Modality.TEXT, np.uint8)
        modality[:patches] = Modality.VISION
        modality[patches : patches + 3] = Modality.INERTIAL, Modality.STATE, Modality.ACTION
        ids = np.full(size, text.start, np.int64)
        ids[:patches], ids[patches] = Placeholder.VISION, Placeholder.INERTIAL
        ids[patches + 1 : patches + 3] = Structure.STATE, Structure.ACTION
        labels = np.where(modality == Modality.TEXT, ids, IGNORE)
        labels[-1] = IGNORE
        slices = np.where(modality == Modality.VISION, 0, NO_SLICE).astype(np.int32)
        first = size * torch.arange(documents)

        def everywhere(row: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.tile(row, documents)).view(self.sequences, self.length)

        def values(width: int, index: torch.Tensor, room: int) -> Values:
            spare = torch.full((room - len(index),), -1)
            return Values(torch.zeros(room, width), torch.cat([index, spare]))

        inputs = assumed.inputs
        image = (first[:, None] + torch.arange(patches)).flatten()
        spans = torch.stack([first, first + patches, first + patches + 3, first + size], 1).view(-1, 2, 2)
        order = np.arange(size, dtype=np.int32)
        continuous = documents if inputs.action_dim else 0
        return PackedBatch(
            token_ids=everywhere(ids),
            modality=everywhere(modality),
            document=torch.arange(self.count, dtype=torch.int32).repeat_interleave(size).repeat(self.sequences, 1),
            slice=everywhere(slices),
            position=everywhere(order)[..., None].expand(-1, -1, 3).contiguous(),
            camera=everywhere(np.full(size, NO_CAMERA, np.int8)),
            offset_ns=everywhere(order.astype(np.int64) // max(patches, 1)),
            source=everywhere(np.zeros(size, np.int16)),
            labels=everywhere(labels),
            loss_weight=torch.ones(self.sequences, self.length),
            values={
                Modality.VISION: values(
                    inputs.patch_dim + inputs.patch_coordinates, image, self.sequences * self.patch_budget
                ),
                Modality.INERTIAL: values(inputs.inertial_dim, first + patches, documents),
                Modality.STATE: values(inputs.state_dim, first + patches + 1, documents),
            },
            action_target=torch.zeros(continuous, inputs.action_chunk, inputs.action_dim),
            action_mask=torch.ones(continuous, inputs.action_chunk, inputs.action_dim, dtype=torch.bool),
            action_index=(first + patches + 2)[:continuous],
            pairs=Pairs(
                span=spans,
                modality=torch.tensor([[Modality.VISION, Modality.TEXT]], dtype=torch.uint8).repeat(documents, 1),
                text_hash=torch.arange(documents),
                group=torch.zeros(documents, dtype=torch.int64),
            ),
            cu_seqlens=(size * torch.arange(documents + 1)).int(),
            documents=[[(0, 0, row, 0) for row in range(self.count)]] * self.sequences,
        )
