"""Finds what chosen ranks of a large mesh would hold, send and compute, by dry runs and by closed forms beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from mmoe.config.extensions import import_extensions
from mmoe.errors import ConfigError
from mmoe.models.decoder import MultimodalModel
from mmoe.models.flops import RankWork, computed_flops, model_flops
from mmoe.optim.config import OptimConfig
from mmoe.parallel.mesh import ParallelDims
from mmoe.parallel.pipeline import on_meta
from mmoe.parallel.setting import RankSetting
from mmoe.planning.communication import Communication, MicroBatch
from mmoe.planning.communication_traffic import Traffic
from mmoe.planning.dry_run import RankCost, dry_run
from mmoe.planning.dry_run_batch import Assumed, Documents
from mmoe.planning.dry_run_routing import Load
from mmoe.planning.memory import StateMemory
from mmoe.planning.memory_shards import RankPlace
from mmoe.recipe.config import RunConfig
from mmoe.recipe.resolved import ResolvedRun


@dataclass(frozen=True)
class Plan:
    """Holds what a dry run is made with: the resolved run, its optimizers, and the assumed data and load of experts."""

    run: RankSetting
    optim: OptimConfig
    assumed: Assumed
    documents: Documents
    load: Load
    extensions: tuple[str, ...]

    @classmethod
    def from_config(
        cls, config: RunConfig, world: int, imbalance: float, documents: int, vocabulary: int | None
    ) -> Plan:
        """Plan the dry run of `config` on `world` ranks.

        `imbalance` is the load of the busiest rank of ep over the mean, `documents` fill a sequence, and `vocabulary`
        is the number of ids (None: as the tokenizer has). Raises ConfigError where the config cannot run so.
        """
        run, patches = ResolvedRun.from_config(config, world), config.tokenizers.vision.max_patches
        return cls(
            run,
            config.optim,
            Assumed.from_config(config.tokenizers, len(config.data.sources), vocabulary),
            Documents.from_config(config.data, patches, run.batch.micro_batch_sequences, documents),
            Load.from_imbalance(imbalance, config.model, run.dims),
            config.extensions,
        )

    @property
    def dims(self) -> ParallelDims:
        """The degrees of the mesh."""
        return self.run.dims

    def cost(self, rank: int) -> RankCost:
        """Find the cost of `rank` by the dry run."""
        return dry_run(self.run, self.optim, rank, self.assumed, self.documents, self.load)

    def place(self, rank: int) -> RankPlace:
        """Return where a rank stands on the axes that cut parameters."""
        within = rank % (self.dims.world // self.dims.pp)
        return RankPlace(within // self.dims.tp % self.dims.fsdp, within % self.dims.tp)

    def stage(self, rank: int) -> int:
        """Return the number of the pipeline stage of a rank."""
        return rank // (self.dims.world // self.dims.pp)

    def labels(self, rank: int) -> int:
        """Count the labels that the rank works out in a micro-batch."""
        context = rank // self.dims.tp % self.dims.cp
        return len(range(context, self.documents.sequences * self.documents.labels, self.dims.cp))

    def micro_batch(self, rank: int) -> MicroBatch:
        """Count what a micro-batch brings to a rank: labels, pairs and routed rows."""
        dims, moe = self.dims, self.run.model.moe
        pairs = -(-self.documents.sequences * self.documents.count // dims.sequence_ranks)
        if moe is None:
            return MicroBatch(self.labels(rank), pairs)
        slots = self.documents.sequences * self.documents.length // dims.sequence_ranks * moe.top_k
        sent = self.load.sent(slots, dims.ep, rank % dims.ep, moe.capacity_factor)
        return MicroBatch(self.labels(rank), pairs, sum(sent), sent[rank % dims.ep] * dims.ep)

    def traffic(self, rank: int) -> Traffic:
        """Compute the traffic of `rank` in a step by the formula."""
        return self._communication(rank).step(self.micro_batch(rank), self.assumed.sources)

    def memory(self, rank: int) -> StateMemory:
        """Compute the memory of the states of `rank` by the formula."""
        return StateMemory.from_setting(self.run, self.optim, self._model(rank), self.place(rank))

    def flops(self, rank: int) -> int:
        """Compute the operations of `rank` in a step by the formula."""
        run, formula = self.run, self._communication(rank)
        work = RankWork(
            sequences=self.documents.sequences,
            documents=(self.documents.size,) * self.documents.count,
            labels=self.labels(rank),
            rows=formula.expert_rows(self.micro_batch(rank)),
            sequence_ranks=run.dims.sequence_ranks,
            tp=run.dims.tp,
            again=(run.parallel.activation_checkpointing == "full") + run.needs_embedding_pass,
        )
        vocabulary = self.assumed.inputs.vocabulary_size
        return computed_flops(run.model, vocabulary, formula.layers, formula.last, work) * run.batch.accumulation

    def _model(self, rank: int) -> MultimodalModel:
        return on_meta(self.run, self.assumed.inputs, self.stage(rank))

    def _communication(self, rank: int) -> Communication:
        return Communication(self.run, self._model(rank), self.place(rank))

    def model_flops(self, cost: RankCost) -> float:
        """Compute the operations of a step that the model itself asks of a rank (6 N and attention).

        They are an equal share of those of a replica.
        """
        documents = [self.documents.size] * (self.documents.count * self.documents.sequences)
        wanted = model_flops(self.run.model, self.assumed.inputs, documents) * cost.micro_batches
        return wanted / (self.dims.pp * self.dims.sequence_ranks)

    def ranks(self, asked: list[int]) -> list[int]:
        """Return the ranks `asked` for, or without any the first of the first, a middle and the last pipeline stage.

        Raises ConfigError for a rank that is none of the plan's.
        """
        world, pp = self.dims.world, self.dims.pp
        ranks = asked or [world // pp * stage for stage in sorted({0, pp // 2, pp - 1})]
        for rank in ranks:
            if not 0 <= rank < world:
                raise ConfigError(f"--rank is {rank}, but --world-size {world} has the ranks 0 to {world - 1}")
        return ranks

    def costs(self, ranks: list[int]) -> list[RankCost]:
        """Find the costs of `ranks` by dry runs in a process each.

        torch keeps the groups of every mesh that it has seen; and side by side the dry runs take less time.
        """
        workers = min(len(ranks), os.cpu_count() or 1)
        with get_context("spawn").Pool(workers, _begin, (self.extensions,), maxtasksperchild=1) as pool:
            return pool.map(self.cost, ranks, chunksize=1)


def _begin(extensions: tuple[str, ...]) -> None:
    """Make a process ready for a plan, which may name by kind what `extensions` register."""
    torch.set_num_threads(1)
    import_extensions(extensions)
