"""Embeds what enters the backbone: token ids, vectors of continuous modalities, cameras and wall-clock time.

All that is trainable about a modality before the first block lives here. Shape suffixes: B sequences, L positions,
D model width (`size`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.schema.batch import PackedBatch
from mmoe.schema.modality import BUILT_IN, Modality
from mmoe.schema.rig import STANDARD
from mmoe.tokenizers.actions import ActionConfig
from mmoe.tokenizers.vision import COORDINATES

SHORTEST_PERIOD_NS = 2_000_000
PERIODS = 22  # doubling from 2 ms to 70 minutes


@dataclass(frozen=True)
class ModelInputs:
    """Holds what the data brings to the model; a size of 0 means that no source of the run has it."""

    vocabulary_size: int
    patch_dim: int = 0  # pixels of a patch vector
    patch_coordinates: int = 0  # numbers behind them that say where in its image it lies
    inertial_dim: int = 0
    state_dim: int = 0
    action_chunk: int = 0
    action_dim: int = 0
    cameras: int = len(STANDARD.cameras)
    further: tuple[tuple[Modality, int], ...] = ()  # modalities that are not built in, and the size of their vectors

    @classmethod
    def from_data(
        cls, vocabulary_size: int, dims: Mapping[Modality, int], action: ActionConfig, cameras: int
    ) -> "ModelInputs":
        """Take the sizes from the data of a run.

        `dims`: the numbers of a vector of each modality, 0 where no source has it; those of a patch end with its
        coordinates, and actions that are ids have no vectors.
        """
        patch = dims[Modality.VISION]
        return cls(
            vocabulary_size=vocabulary_size,
            patch_dim=patch - COORDINATES if patch else 0,
            patch_coordinates=COORDINATES if patch else 0,
            inertial_dim=dims[Modality.INERTIAL],
            state_dim=dims[Modality.STATE],
            action_chunk=action.chunk,
            action_dim=0 if action.mode == "discrete" else dims[Modality.ACTION],
            cameras=cameras,
            further=tuple((kind, size) for kind, size in dims.items() if kind >= BUILT_IN and size),
        )


class TokenTable(Protocol):
    """Holds a vector for each id: an `nn.Embedding` or a table that ranks share."""

    @property
    def weight(self) -> Tensor:
        """The vectors [ids, D]."""

    def __call__(self, ids_BL: Tensor, /) -> Tensor:
        """Look up the vectors [B, L, D] of the ids [B, L]."""


class PatchEmbedding(nn.Module):
    """Embeds patch vectors [..., pixels + coordinates] as [..., size] by a network of one hidden layer.

    The coordinates of a patch in its image gate what is seen in it: what a lane marking means depends on where it
    is, and a gate says so from the first step, where attention would have to find every place out by itself
    (docs/decisions.md).
    """

    def __init__(self, pixels: int, coordinates: int, size: int) -> None:
        super().__init__()
        self.sizes = (pixels, coordinates)
        self.hidden = nn.Linear(pixels, size)
        self.place = nn.Linear(coordinates, size) if coordinates else None
        self.output = nn.Linear(size, size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patch vectors [..., pixels + coordinates] as [..., size]."""
        pixels, coordinates = patches.split(self.sizes, dim=-1)
        hidden = F.silu(self.hidden(pixels))
        if self.place is not None:
            hidden = hidden * (1 + self.place(coordinates))
        return self.output(hidden)


class TimeEmbedding(nn.Module):
    """Embeds integer nanoseconds as [..., size]. Zero time gives exactly zero, so what is not timed is left alone.

    The features are sin and cos - 1 of the phases of periods that double from 2 ms to over an hour. The phase is
    taken from the integer remainder, so it is as exact for a time of years as for one of milliseconds.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * PERIODS, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def features(self, time_ns: Tensor) -> Tensor:
        """Compute the sines and cosines of the phases of a time in nanoseconds, i64 [...] -> f64 [..., 2 * PERIODS]."""
        period = SHORTEST_PERIOD_NS * 2 ** torch.arange(PERIODS, device=time_ns.device)
        phase = 2 * torch.pi * (time_ns[..., None].remainder(period) / period.double())
        return torch.cat((phase.sin(), phase.cos() - 1), dim=-1)

    def forward(self, time_ns: Tensor) -> Tensor:
        """Embed nanoseconds i64 [...] as [..., size]."""
        features = self.features(time_ns).to(self.hidden.weight.dtype)
        return self.output(F.silu(self.hidden(features)))


class Embeddings(nn.Module):
    """Embeds a PackedBatch as [B, L, size].

    Vectors take the place of their placeholder's embedding; STATE, and what else `adds`, is added to that of its
    token, as the embeddings of camera and time are wherever a position has one.
    """

    def __init__(self, inputs: ModelInputs, size: int) -> None:
        super().__init__()
        self.token: TokenTable = nn.Embedding(inputs.vocabulary_size, size)
        self.camera = nn.Embedding(inputs.cameras, size)
        self.time = TimeEmbedding(size)
        projections: dict[Modality, nn.Module] = {}
        if inputs.patch_dim:
            projections[Modality.VISION] = PatchEmbedding(inputs.patch_dim, inputs.patch_coordinates, size)
        if inputs.inertial_dim:
            projections[Modality.INERTIAL] = nn.Linear(inputs.inertial_dim, size)
        if inputs.state_dim:
            projections[Modality.STATE] = nn.Linear(inputs.state_dim, size)
        projections |= {kind: kind.spec.embedding(dim, size) for kind, dim in inputs.further}
        self.values = nn.ModuleDict({kind.name.lower(): module for kind, module in projections.items()})

    def forward(self, batch: PackedBatch) -> Tensor:
        """Embed the batch, [B, L, size].

        Raises ConfigError when it holds vectors of a modality that the model was built without.
        """
        x = self.token(batch.token_ids).flatten(0, 1)
        for kind, values in batch.values.items():
            if kind.name.lower() not in self.values:
                raise ConfigError(
                    f"the batch holds {kind.name} vectors, but the model was built without them; "
                    "build it from the sources that it is run on"
                )
            vectors = self.values[kind.name.lower()](values.values.to(x.dtype)).to(x.dtype)
            x = _scatter(x, vectors, values.index, replace=not kind.spec.adds)
        return x.view(*batch.shape, -1) + self._camera(batch) + self._time(batch)

    def _camera(self, batch: PackedBatch) -> Tensor:
        none_first = F.pad(self.camera.weight, (0, 0, 1, 0))
        return F.embedding(batch.camera.long() + 1, none_first, padding_idx=0)

    def _time(self, batch: PackedBatch) -> Tensor:
        # A batch has few different times: all patches of an image share theirs.
        times, which = batch.offset_ns.unique(return_inverse=True)
        return F.embedding(which, self.time(times).to(self.token.weight.dtype))


def _scatter(x: Tensor, vectors: Tensor, index: Tensor, replace: bool) -> Tensor:
    """Put `vectors` at the rows `index` of x [N, D], replacing or adding; index -1 goes to a row that nobody reads."""
    unread = F.pad(x, (0, 0, 0, 1))
    index = index.remainder(len(unread))
    return (unread.index_copy(0, index, vectors) if replace else unread.index_add(0, index, vectors))[:-1]
