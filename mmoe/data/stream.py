"""The stream: prepared sources -> optimizer steps of `PackedBatch`es, planned here and decoded by workers."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Dataset

from mmoe.backends import require
from mmoe.config.base import Config
from mmoe.data.batch import PackedBatch
from mmoe.data.collate import Collator
from mmoe.data.decode import Ablation, Decoder, SourceFiles
from mmoe.data.index import SourceManifest
from mmoe.data.mixture import explicit_shares, temperature_shares
from mmoe.data.plan import Counts, PlannedSource, Planner, PlanSettings, SequencePlan
from mmoe.data.sample import Modality
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.tokenizers.text import check_fingerprint


class SourceConfig(Config):
    """One source of the mixture.

    `shards` is the prepared folder. `kind` and `input` say how to prepare it where it does not exist yet
    (`mmoe prepare kind input shards`); `options` go to the reader.
    """

    shards: str
    kind: str
    input: str = ""
    options: dict[str, Any] = {}
    weight: float | None = Field(default=None, ge=0)  # share of positions; null: by size and temperature


class DataConfig(Config):
    sources: dict[str, SourceConfig] = Field(min_length=1)
    sequence_length: int = Field(gt=8)
    patches_per_sequence: int = Field(default=0, ge=0)  # 0: as many as a sequence has positions
    window_documents: int = Field(default=1024, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    isolated_pair_share: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(default=0, ge=0)  # decoding processes; 0 decodes in the training process
    prefetch: int = Field(default=4, gt=0)  # micro-batches a worker holds ready
    video_backend: Literal["decord", "pyav"] = "decord"

    @model_validator(mode="after")
    def _weights(self) -> "DataConfig":
        given = [name for name, source in self.sources.items() if source.weight is not None]
        if given and len(given) < len(self.sources):
            missing = sorted(set(self.sources) - set(given))
            raise ValueError(
                f"sources {given} have a weight and {missing} have none; give every source a weight, or none "
                "(then data.temperature decides)"
            )
        return self

    @property
    def patch_budget(self) -> int:
        return self.patches_per_sequence or self.sequence_length


@dataclass(frozen=True)
class StepData:
    """One optimizer step: its micro-batches, its planned counts, and the stream state after it."""

    batches: Iterator[PackedBatch]
    counts: Counts
    state: dict[str, Any]


class SequenceDataset(Dataset):
    """Map-style over *plans*: the sampler hands a worker a list of sequences, the worker returns the batch."""

    def __init__(self, decoder: Decoder, collator: Collator, group: int):
        self.decoder, self.collator, self.group = decoder, collator, group

    def __getitem__(self, plan: tuple[int, list[SequencePlan]]) -> PackedBatch:
        first, sequences = plan
        decoded = [[(ref, self.decoder(ref)) for ref in sequence.documents] for sequence in sequences]
        return self.collator(decoded, self.group, first)


class Sources:
    """The prepared sources of a run with their manifests, in config order; the order numbers them."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.names = list(config.sources)
        self.folders = [Path(source.shards) for source in config.sources.values()]
        self.manifests = {
            name: SourceManifest.load(folder) for name, folder in zip(self.names, self.folders, strict=True)
        }

    def check(self, tokenizers: Tokenizers) -> None:
        """Raises DataError where an index was written with another text tokenizer."""
        for folder, manifest in zip(self.folders, self.manifests.values(), strict=True):
            check_fingerprint(tokenizers.text, manifest.text_fingerprint, folder)

    def planned(self, split: str, seed: int, only: list[str] | None = None) -> list[PlannedSource]:
        return [
            PlannedSource(number, name, folder, self.manifests[name], split, seed)
            for number, (name, folder) in enumerate(zip(self.names, self.folders, strict=True))
            if only is None or name in only
        ]

    def files(self, split: str) -> list[SourceFiles]:
        return [
            SourceFiles(name, tuple(str(folder / s.path) for s in self.manifests[name].splits[split].shards))
            if split in self.manifests[name].splits
            else SourceFiles(name, ())
            for name, folder in zip(self.names, self.folders, strict=True)
        ]

    def shares(self, planned: list[PlannedSource], tokenizers: Tokenizers) -> list[float]:
        """Share of positions by source: the configured weights, or sizes flattened by the temperature."""
        weights = {name: source.weight for name, source in self.config.sources.items()}
        if None not in weights.values():
            return list(explicit_shares(weights).values())
        sizes = {source.name: source.positions(tokenizers) for source in planned}
        return list(temperature_shares(sizes, self.config.temperature).values())


class Stream:
    """Endless training steps; `restore` continues exactly where a step's `state` was taken."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sources,
        tokenizers: Tokenizers,
        *,
        seed: int,
        micro_sequences: int,
        accumulation: int,
        group_sequences: int,
        label_weights: np.ndarray,
    ):
        require(config.video_backend, "data.video_backend")
        self.config, self.micro_sequences, self.accumulation = config, micro_sequences, accumulation
        planned = sources.planned("train", seed)
        settings = PlanSettings(
            seed=seed,
            sequence_length=config.sequence_length,
            patches_per_sequence=config.patch_budget,
            window_documents=config.window_documents,
            isolated_pair_share=config.isolated_pair_share,
        )
        self.shares = sources.shares(planned, tokenizers)
        self.planner = Planner(planned, self.shares, tokenizers, settings)
        self.collator = make_collator(config, tokenizers, label_weights)
        decoder = Decoder(sources.files("train"), tokenizers, config.video_backend)
        self.dataset = SequenceDataset(decoder, self.collator, group_sequences)

    def restore(self, state: dict[str, Any]) -> None:
        self.planner.restore(state)

    def steps(self) -> Iterator[StepData]:
        """Plan ahead of the workers, and hand out each step with the state that belongs to its end."""
        ahead: deque[tuple[Counts, dict[str, Any]]] = deque()

        def plans() -> Iterator[tuple[int, list[SequencePlan]]]:
            while True:
                step = [
                    [self.planner.next_sequence() for _ in range(self.micro_sequences)]
                    for _ in range(self.accumulation)
                ]
                counts = sum((s.counts for micro in step for s in micro), Counts.zero())
                ahead.append((counts, self.planner.state.as_dict()))
                for number, micro in enumerate(step):
                    yield number * self.micro_sequences, micro

        batches = iter(make_loader(self.dataset, plans(), self.config))
        while True:
            # The first micro-batch is fetched before the counts are read: fetching is what makes the plan advance.
            first = next(batches)
            counts, state = ahead.popleft()

            def micro(first: PackedBatch = first) -> Iterator[PackedBatch]:
                yield first
                for _ in range(self.accumulation - 1):
                    yield next(batches)

            yield StepData(micro(), counts, state)


def make_collator(
    config: DataConfig,
    tokenizers: Tokenizers,
    label_weights: np.ndarray,
    skip: frozenset[Modality] = frozenset(),
) -> Collator:
    return Collator(
        length=config.sequence_length,
        patches=config.patch_budget,
        dims={kind: 0 if kind in skip else size for kind, size in tokenizers.value_dims.items()},
        action_shape=(tokenizers.config.action.chunk, tokenizers.dims[Modality.ACTION].size),
        vocabulary=tokenizers.vocabulary,
        weights=label_weights,
    )


def make_loader(dataset: Dataset, plans: Any, config: DataConfig) -> DataLoader:
    """A loader that keeps the order of `plans` and hands batches through as they are."""
    return DataLoader(
        dataset,
        sampler=plans,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def heldout_batches(
    config: DataConfig,
    sources: Sources,
    tokenizers: Tokenizers,
    *,
    seed: int,
    micro_sequences: int,
    label_weights: np.ndarray,
    isolated: bool,
    split: str = "heldout",
    only: list[str] | None = None,
    ablation: Ablation | None = None,
    skip: frozenset[Modality] = frozenset(),
    most_documents: int | None = None,
) -> Iterator[PackedBatch]:
    """Every document of a split once; `isolated` packs every pair as two documents, else none.

    `most_documents`: of a source that has more, a seeded choice of so many.
    """
    planned = sources.planned(split, seed, only)
    settings = PlanSettings(seed, config.sequence_length, config.patch_budget, 1, 1.0 if isolated else 0.0)
    planner = Planner(planned, [1.0 / len(planned)] * len(planned), tokenizers, settings)
    sequences = planner.once(most_documents)
    decoder = Decoder(sources.files(split), tokenizers, config.video_backend, ablation, skip)
    dataset = SequenceDataset(decoder, make_collator(config, tokenizers, label_weights, skip), group=1)
    plans = [(i, sequences[i : i + micro_sequences]) for i in range(0, len(sequences), micro_sequences)]
    yield from make_loader(dataset, plans, config)
