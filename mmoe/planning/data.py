"""Says what a config's data will do before anything is decoded: stages by source, and the plan of the first steps."""

from dataclasses import dataclass

import numpy as np

from mmoe.data.config import DataConfig
from mmoe.data.index.shard_index import is_prepared
from mmoe.data.plan.assignment import assign_to_replicas, balance
from mmoe.data.plan.mixture import Mixture
from mmoe.data.plan.planner import Planner
from mmoe.data.plan.prepared import PreparedSources, sizes
from mmoe.data.storage.store import Storage
from mmoe.recipe.config import RunConfig
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.bundle import TokenizersConfig


@dataclass(frozen=True)
class SourceForecast:
    """Says what a source has of the steps that `inspect` has planned."""

    name: str
    share: float  # of all positions
    target: float  # the share that the mixture aims at
    parts: int  # of documents
    positions: int
    epochs: float


@dataclass(frozen=True)
class Inspection:
    """Says what is in the first steps of a run."""

    sources: list[SourceForecast]
    sequences: int
    length: int  # of a sequence, in positions
    packing_efficiency: float  # share of the positions that hold something
    balance: tuple[float, float]  # attention and vision work of the busiest replica over the mean
    lost: dict[str, int]  # what was cut or dropped up to the end of the last window, by reason


def mixture_of(data: DataConfig, tokenizers: TokenizersConfig, end: int) -> Mixture:
    """Build the mixture of a run of `end` positions; sources whose `positions` are given need not be prepared yet."""
    storage = Storage(data.storage)
    unknown = {
        name: SourceManifest.load(source.shards, storage.read)
        for name, source in data.sources.items()
        if source.positions is None and is_prepared(source.shards, storage)
    }
    built = tokenizers.build(unknown, storage.read) if unknown else None
    return Mixture(data.stages, sizes(data, unknown, built), end)


def inspect(config: RunConfig, steps: int, replicas: int) -> Inspection:
    """Plan so many steps from the start of the run and look at what is in them; nothing is decoded."""
    group, micro = config.contrastive_group, config.batch_of(replicas).micro_batch_sequences
    sources = PreparedSources(config.data)
    tokenizers = config.tokenizers.build(sources.manifests, sources.storage.read)
    sources.check(tokenizers)
    limits = config.data.limits(config.training.seed)
    planned = sources.planned("train", limits, tokenizers)
    mixture = sources.mixture(tokenizers, config.training.budget_positions)
    planner = Planner(planned, mixture, limits, config.data.window_documents)
    batches = [[planner.next_sequence() for _ in range(config.batch.sequences)] for _ in range(steps)]
    sequences = [sequence for batch in batches for sequence in batch]
    parts = np.concatenate([sequence.parts for sequence in sequences])
    positions = sum(sequence.counts.positions for sequence in sequences)
    length = config.data.sequence_length

    targets = np.mean([mixture.shares(s.number * length) for s in sequences], axis=0)
    shares = []
    for source, target in zip(planned, targets.tolist(), strict=True):
        mine = parts[parts["source"] == source.number]
        served, begun = int(mine["length"].sum()), int((mine["part"] == 0).sum())
        shares.append(SourceForecast(source.name, served / positions, target, len(mine), served, begun / source.rows))
    works = [np.array([s.counts.work for s in batch]) for batch in batches]
    balances = [balance(work, assign_to_replicas(work, group, micro, replicas)) for work in works]
    attention, vision = np.mean(balances, axis=0).tolist()
    efficiency = positions / (len(sequences) * length)
    lost = dict(sorted(planner.lost.items()))
    return Inspection(shares, len(sequences), length, efficiency, (attention, vision), lost)
