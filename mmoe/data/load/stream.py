"""Stream prepared sources as optimizer steps of `PackedBatch`es, planned here and decoded by workers."""

import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmoe.data.config import DataConfig
from mmoe.data.load.collate import Collator
from mmoe.data.load.decode import SampleLoader
from mmoe.data.load.loader import batches
from mmoe.data.load.quarantine import ENDED_WORKER, Quarantine
from mmoe.data.load.workers import Activity, SamplePlace
from mmoe.data.plan.assignment import assign_to_replicas, balance, check_dealing
from mmoe.data.plan.planner import DocumentRef, Planner, SequencePlan
from mmoe.data.plan.prepared import PreparedSources
from mmoe.data.storage.store import StorageError
from mmoe.errors import DataError, MmoeError
from mmoe.modalities.document import Document
from mmoe.optional import require
from mmoe.schema.batch import PackedBatch
from mmoe.schema.bounds import Bounds, bounded_by
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality
from mmoe.schema.quarantined import Quarantined
from mmoe.tokenizers.bundle import Tokenizers


@dataclass(frozen=True)
class StepData:
    """Holds one optimizer step of this replica: its micro-batches, and the planned counts of the whole global batch.

    With it goes where the plan stands after the step. `lost` counts the documents cut or dropped so far, by
    "source / reason"; `balance` is that of attention and of vision work over the replicas.
    """

    batches: Iterator[PackedBatch]
    counts: Counts
    plan: dict[str, Any]
    lost: dict[str, int]
    balance: tuple[float, float]


class SequenceDataset:
    """Decodes the plan of a batch, a list of sequences, into that batch.

    A part that cannot be decoded becomes padding and is named in the batch, whatever its decoder raised; with
    `strict` a DataError names it. A store that does not answer raises in any case: that is no fault of the sample.
    """

    def __init__(
        self, decoder: SampleLoader, collator: Collator, group: int, activity: Activity, bounds: Bounds, strict: bool
    ) -> None:
        self.decoder, self.collator, self.group, self.bounds = decoder, collator, group, bounds
        self.activity, self.strict = activity, strict
        self.known_bad: dict[SamplePlace, str] = {}  # samples that are not decoded, with the reason

    def __getitem__(self, sequences: list[SequencePlan]) -> PackedBatch:
        lost: list[Quarantined] = []
        self.activity.say("reading")
        refs = (ref for sequence in sequences for ref in sequence.documents)
        self.decoder.prefetch(ref for ref in refs if _place(ref) not in self.known_bad)
        # Whoever asks may be about to run the model in bfloat16: codes of audio must not depend on that.
        with bounded_by(self.bounds), torch.autocast("cpu", enabled=False):
            decoded = [
                [
                    (ref, self._documents(ref, length, lost))
                    for ref, length in zip(sequence.documents, sequence.parts["length"].tolist(), strict=True)
                ]
                for sequence in sequences
            ]
        self.activity.say("collating")
        batch = self.collator(decoded, [sequence.number // self.group for sequence in sequences], tuple(lost))
        self.activity.say("waiting for the next plan")
        return replace(batch, reads=self.decoder.storage.stats.take())

    def _documents(self, ref: DocumentRef, length: int, lost: list[Quarantined]) -> list[Document] | int:
        source = self.decoder.sources[ref.source]
        tar = source.tars[ref.shard]
        self.activity.say(f"decoding row {ref.row} of {tar}", _place(ref))
        try:
            if (reason := self.known_bad.get(_place(ref))) is not None:
                raise DataError(reason)
            documents = self.decoder(ref)
            found = sum(map(len, documents))
            if found != length and not self.decoder.skip:
                raise DataError(
                    f"{tar}: row {ref.row} decodes to {found} positions, its index says {length}; prepare the source "
                    "again"
                )
            return documents
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, MmoeError) and not isinstance(error, DataError):
                raise  # a package that is missing, a setting: no sample is to blame
            key = self._key(ref)
            if self.strict:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{tar}: {key or f'row {ref.row}'} cannot be decoded: {_unforeseen(error)}") from error
            reason = str(error) if isinstance(error, DataError) else _unforeseen(error)
            lost.append(Quarantined(ref.source, tar, ref.row, key, reason, length))
            return length

    def _key(self, ref: DocumentRef) -> str:
        try:
            return self.decoder.index(ref.source, ref.shard).keys[ref.row]
        except DataError:
            return ""  # the index itself cannot be read: the reason says so

    def name(self, place: SamplePlace) -> str:
        """Return what a sample is called in messages."""
        source, shard, row = place
        return f"row {row} of {self.decoder.sources[source].tars[shard]}"


def _place(ref: DocumentRef) -> SamplePlace:
    return int(ref.source), int(ref.shard), int(ref.row)


def _unforeseen(error: Exception) -> str:
    """An exception that no reader translates, with the place that raised it: a damaged file, or a fault of the code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"


class Stream:
    """Yields the endless training steps of one data replica; `restore` continues exactly where a state was taken.

    A global batch is `sequences` consecutive sequences of the plan, the same for any number of `replicas`;
    `assign_to_replicas` gives each its own by attention and vision work, and keeps contrastive groups where their
    negatives can be reached. `end` is the run's length in positions.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: PreparedSources,
        tokenizers: Tokenizers,
        *,
        seed: int,
        end: int,
        sequences: int,
        micro_sequences: int,
        group_sequences: int,
        label_weights: np.ndarray,
        replica: int = 0,
        replicas: int = 1,
        quarantine: Path | None = None,
    ) -> None:
        if config.video_backend == "decord":
            require("decord", "data.video_backend")
        check_dealing(sequences, group_sequences, micro_sequences, replicas)
        self.config, self.sequences = config, sequences
        self.micro_sequences, self.group = micro_sequences, group_sequences
        self.replica, self.replicas = replica, replicas
        limits = config.limits(seed)
        self.mixture = sources.mixture(tokenizers, end)
        planned = sources.planned("train", limits, tokenizers)
        self.planner = Planner(planned, self.mixture, limits, config.window_documents)
        self.reads: Counter[str] = Counter()  # of remote stores, by all workers: see `StorageStats`
        self.quarantine = Quarantine(sources.names, config.error_budget, quarantine)
        self.collator = make_collator(config, tokenizers, label_weights)
        self.collator.check_room(micro_sequences, config.workers, config.prefetch)
        decoder = SampleLoader(sources.files("train"), tokenizers, config.video_backend, storage=sources.storage)
        self.activity = Activity(config.workers)
        self.dataset = SequenceDataset(
            decoder, self.collator, group_sequences, self.activity, config.bounds, strict=False
        )
        self.dataset.known_bad = self.quarantine.known_bad([files.tars for files in decoder.sources])

    def state(self, data: StepData | None = None) -> dict[str, Any]:
        """Return what to resume from, after step `data` (its batches taken), or before the first."""
        return {
            "plan": self.planner.state if data is None else data.plan,
            "quarantine": self.quarantine.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`.

        Raises ConfigError where it is of another number of sources.
        """
        self.planner.restore(state["plan"])
        self.quarantine.load_state_dict(state["quarantine"])

    def steps(self) -> Iterator[StepData]:
        """Plan ahead of the workers, and hand out each step with the state that belongs to its end."""
        ahead: deque[tuple[Counts, dict[str, Any], dict[str, int], tuple[float, float]]] = deque()

        def plans() -> Iterator[list[SequencePlan]]:
            while True:
                step = [self.planner.next_sequence() for _ in range(self.sequences)]
                work = np.array([s.counts.work for s in step])
                dealt = assign_to_replicas(work, self.group, self.micro_sequences, self.replicas)
                attention, vision = balance(work, dealt).tolist()
                counts = Counts.total(s.counts for s in step)
                ahead.append((counts, self.planner.state, self.planner.lost, (attention, vision)))
                mine = dealt[self.replica].tolist()
                for first in range(0, len(mine), self.micro_sequences):
                    yield [step[i] for i in mine[first : first + self.micro_sequences]]

        arriving = self._taken(load_batches(self.dataset, plans(), self.config, self.activity, self._condemn))
        micro_batches = self.sequences // (self.replicas * self.micro_sequences)
        while True:
            # The first micro-batch is fetched before the counts are read: fetching is what makes the plan advance.
            first = next(arriving)
            header = ahead.popleft()

            def micro(first: PackedBatch = first) -> Iterator[PackedBatch]:
                yield first
                for _ in range(micro_batches - 1):
                    yield next(arriving)

            yield StepData(micro(), *header)

    def _condemn(self, place: SamplePlace, how: str) -> None:
        self.dataset.known_bad[place] = f"{ENDED_WORKER} ({how}): {self.dataset.name(place)}"

    def _taken(self, arriving: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches, with what they met and lost counted (until a step's end, by each replica for itself)."""
        for batch in arriving:
            parts = {tuple(origin) for sequence in batch.documents for origin in sequence}
            met = Counter(source for source, *_ in parts) + Counter(item.source for item in batch.quarantined)
            self.quarantine.add(met, batch.quarantined)
            self.reads.update(batch.reads)
            yield batch


def make_collator(
    config: DataConfig,
    tokenizers: Tokenizers,
    label_weights: np.ndarray,
    skip: frozenset[Modality] = frozenset(),
) -> Collator:
    """Make the `Collator` that packs documents into batches of the config's shape.

    `label_weights` [modalities] is the loss weight of a label by the modality of its target; the modalities in `skip`
    get no vectors.
    """
    return Collator(
        length=config.sequence_length,
        patches=config.patch_budget,
        dims={kind: 0 if kind in skip else size for kind, size in tokenizers.value_dims.items()},
        action_shape=(tokenizers.config.action.chunk, tokenizers.dims[Modality.ACTION].size),
        vocabulary=tokenizers.vocabulary,
        weights=label_weights,
    )


def load_batches(
    dataset: SequenceDataset,
    plans: Any,
    config: DataConfig,
    activity: Activity,
    condemn: Callable[[SamplePlace, str], None],
) -> Iterator[PackedBatch]:
    """Yield the batches of `plans`, decoded ahead by the config's workers; `condemn` as for `loader.batches`."""
    return batches(
        dataset,
        plans,
        workers=config.workers,
        prefetch=config.prefetch,
        activity=activity,
        watchdog_seconds=config.watchdog_seconds,
        condemn=condemn,
    )
