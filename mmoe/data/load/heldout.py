"""Read every document of a split once, in batches that one process decodes or that data replicas share."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from mmoe.data.config import DataConfig
from mmoe.data.load.decode import SampleLoader, StandIn
from mmoe.data.load.quarantine import ENDED_WORKER
from mmoe.data.load.stream import SequenceDataset, load_batches, make_collator
from mmoe.data.load.workers import Activity, SamplePlace, WorkerError
from mmoe.data.plan.blocks import PART_DTYPE, rng
from mmoe.data.plan.planner import SequencePlan, plan_once
from mmoe.data.plan.prepared import PreparedSources
from mmoe.schema.batch import PackedBatch
from mmoe.schema.counts import Counts, zeros
from mmoe.schema.modality import Modality
from mmoe.tokenizers.bundle import Tokenizers

T = TypeVar("T")


def dealt(batches: Sequence[list[T]], size: int, nothing: T, replica: int, replicas: int) -> list[list[T]]:
    """Return one replica's share of `batches`: every `replicas`-th one, as many and as large for each.

    Ranks that exchange tokens must do so equally often, with equal shapes: where there are several replicas, a batch of
    fewer than `size` sequences is filled up with `nothing`, and the last round with batches of nothing else.
    """
    if replicas == 1:
        return list(batches)
    filled = [[*batch, *[nothing] * (size - len(batch))] for batch in batches]
    filled += [[nothing] * size] * (-len(batches) % replicas)
    return filled[replica::replicas]


class HeldoutBatches:
    """Holds the batches of a split, planned when this is made and decoded as often as they are asked for.

    `isolated` packs every pair as two documents, else none. Of a source that has more than `most_documents`, a seeded
    choice of so many; of more than `most_batches` batches, a seeded choice of these, the same every time. A sample that
    cannot be decoded raises: a measure of fewer samples would be another measure.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: PreparedSources,
        tokenizers: Tokenizers,
        *,
        seed: int,
        micro_sequences: int,
        label_weights: np.ndarray,
        isolated: bool,
        split: str = "heldout",
        only: list[str] | None = None,
        stand_in: StandIn | None = None,
        skip: frozenset[Modality] = frozenset(),
        most_documents: int | None = None,
        most_batches: int | None = None,
    ) -> None:
        self.config, self.size = config, micro_sequences
        limits = config.limits(seed, 1.0 if isolated else 0.0)
        sequences = plan_once(sources.planned(split, limits, tokenizers, only), limits, most_documents)
        self.plans = [sequences[i : i + micro_sequences] for i in range(0, len(sequences), micro_sequences)]
        if most_batches is not None and len(self.plans) > most_batches:
            chosen = rng(seed, len(self.plans)).choice(len(self.plans), most_batches, replace=False)
            self.plans = [self.plans[number] for number in np.sort(chosen).tolist()]
        decoder = SampleLoader(sources.files(split), tokenizers, config.video_backend, stand_in, skip, sources.storage)
        self._activity = Activity(config.workers)
        collator = make_collator(config, tokenizers, label_weights, skip)
        collator.check_room(micro_sequences, config.workers, config.prefetch)
        self._dataset = SequenceDataset(decoder, collator, 1, self._activity, config.bounds, strict=True)

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self.share(0, 1)

    @property
    def documents(self) -> set[tuple[int, int, int]]:
        """The source, shard and row of every document that the batches hold, or hold a part of."""
        return {ref[:3] for plan in self.plans for sequence in plan for ref in sequence.documents}

    def share(self, replica: int, replicas: int) -> Iterator[PackedBatch]:
        """Decode the batches ``replica``, ``replica + replicas``, ...: as many for each replica (`dealt`)."""
        nothing = SequencePlan(0, np.zeros(0, PART_DTYPE), Counts(zeros()))
        plans = dealt(self.plans, self.size, nothing, replica, replicas)
        config = self.config.model_copy(update={"workers": min(self.config.workers, len(plans))})
        return load_batches(self._dataset, plans, config, self._activity, self._condemn)

    def _condemn(self, place: SamplePlace, how: str) -> None:
        raise WorkerError(
            f"{ENDED_WORKER} ({how}): {self._dataset.name(place)}; prepare the source again, or leave the sample out"
        )
