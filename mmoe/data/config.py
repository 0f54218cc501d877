"""Declares the `data.*` keys of a config: the sources of a run, the stages that mix them, packing and decoding."""

from typing import Annotated

from pydantic import Field, model_validator

from mmoe.config.base import Address, Config, Options
from mmoe.config.nature import Nature
from mmoe.data.load.video import VideoBackend
from mmoe.data.plan.blocks import SequenceBudget
from mmoe.data.plan.mixture import StageConfig, check_mixture_stages
from mmoe.data.storage.store import StorageConfig
from mmoe.schema.bounds import Bounds


class SourceConfig(Config):
    """Configures one source of the mixture: its folder, how it is prepared, and its options.

    `shards` is the prepared folder, a local path or a URL (s3://, gs://, https://). `kind` and `input` say how to
    prepare it where it does not exist yet (`mmoe prepare kind input shards`); a simulation has no `input`.
    `options` go to the reader.
    """

    # Places: what lies there is compared by its contents.
    shards: Annotated[Address, Nature.OPERATIONAL]
    kind: str  # of the reader, as `mmoe prepare` names it
    input: Annotated[Address | None, Nature.OPERATIONAL] = None  # null: nothing to prepare it from
    options: Options = Field(default_factory=dict)  # of the reader and of the preparation
    positions: int | None = Field(default=None, gt=0)  # of one epoch, for the mixture; null: as the manifest says
    # Of the whole run; null: as many as the stages ask for.
    max_epochs: Annotated[float | None, Nature.EXTENDABLE] = Field(default=None, gt=0)


class DataConfig(Config):
    """Says which sources a run reads, in which stages, and how they are packed and decoded."""

    sources: dict[str, SourceConfig] = Field(min_length=1)  # by name: the sources of the mixture
    # By name, in their order: the mixtures of the run.
    stages: dict[str, StageConfig] = Field(default={"all": StageConfig(temperature=1.0)}, min_length=1)
    sequence_length: int = Field(gt=8, le=1 << 24)  # positions, padding included
    patches_per_sequence: int = Field(default=0, ge=0, le=1 << 24)  # 0: as many as a sequence has positions
    window_documents: int = Field(default=4096, gt=0, le=1 << 20)  # documents that are packed together, then shuffled
    isolated_pair_share: float = Field(default=0.5, ge=0, le=1)  # of the pairs whose text is a document of its own
    # Decoding processes. With 0 the training process decodes, and a decoder that crashes takes the run with it, at
    # every restart again; a worker's crash costs its sample.
    workers: Annotated[int, Nature.OPERATIONAL] = Field(default=0, ge=0, le=1024)
    # Micro-batches a worker holds ready.
    prefetch: Annotated[int, Nature.OPERATIONAL] = Field(default=4, gt=0, le=1024)
    video_backend: VideoBackend = "auto"  # decord: for videos that it is proven to read, the others are refused
    # Share of a source's documents that may be quarantined.
    error_budget: Annotated[float, Nature.OPERATIONAL] = Field(default=0.01, ge=0, le=1)
    # Without a batch, until the workers are listed.
    watchdog_seconds: Annotated[float, Nature.OPERATIONAL] = Field(default=120.0, gt=0)
    storage: StorageConfig = StorageConfig()
    bounds: Bounds = Bounds()  # of what is read of one file

    @model_validator(mode="after")
    def _stages(self) -> "DataConfig":
        check_mixture_stages(self.stages, list(self.sources))
        return self

    @property
    def patch_budget(self) -> int:
        """The number of VISION vectors that a sequence has room for."""
        return self.patches_per_sequence or self.sequence_length

    def limits(self, seed: int, isolated_pair_share: float | None = None) -> SequenceBudget:
        """Return what one sequence holds, as a `SequenceBudget` with the draws keyed by `seed`.

        `isolated_pair_share`, where given, takes the place of the configured one.
        """
        share = self.isolated_pair_share if isolated_pair_share is None else isolated_pair_share
        return SequenceBudget(seed, self.sequence_length, self.patch_budget, share)
