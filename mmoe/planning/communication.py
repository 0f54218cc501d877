"""Computes the bytes per optimizer step by axis and collective, from the config and the degrees alone.

Left out: handing batches to peers (sizes of pickled objects), checkpoints, Muon's gathers of momentum, flags of the
loop (8 bytes a step), and the first of two passes where contrastive groups are wider than what is embedded at once.

Shape suffixes of the comments: B sequences of a micro-batch, L positions of which M = L / cp are in attention and
H = M / tp elsewhere, D model width, E experts, K top_k, n labels, P pairs of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmoe.data.plan.assignment import ContrastiveScope
from mmoe.models.moe.balance import router_losses
from mmoe.models.moe.dispatch import rounded_up
from mmoe.models.moe.statistics import CAPACITY_FACTORS
from mmoe.parallel.expert import PaddedAllToAllDispatcher, parallel_dispatcher_of
from mmoe.parallel.pipeline import TIED, StageModel
from mmoe.parallel.reports import report_size
from mmoe.parallel.setting import RankSetting
from mmoe.planning.communication_traffic import Traffic, ranks_of, traffic_axis
from mmoe.planning.memory_shards import RankPlace, by_unit, shards
from mmoe.schema.modality import Modality

WIDE = 8  # bytes of an integer, and of what is added up for reports


@dataclass(frozen=True)
class MicroBatch:
    """Says what a rank sees of a micro-batch: the `labels` and `pairs` that it works out, and the rows of its experts.

    Where rows travel as they are routed, `sent` and `received` are their numbers in a layer.
    """

    labels: int
    pairs: int
    sent: int = 0
    received: int = 0


class Communication:
    """Computes the traffic of one rank at `place`, whose part of the model is `model` (on meta)."""

    def __init__(self, setting: RankSetting, model: nn.Module, place: RankPlace | None = None) -> None:
        self.setting, self.dims, self.batch = setting, setting.dims, setting.batch
        self.place = place or RankPlace()
        self.shards = shards(setting.model, setting.precision, model, self.dims, self.place)
        self.wide = setting.precision.parameter_dtype.itemsize
        self.narrow = 2 if setting.precision.compute == "bfloat16" else self.wide
        stages = model.layers if isinstance(model, StageModel) else [range(setting.model.n_layers)]
        self.here = model.here if isinstance(model, StageModel) else range(1)
        self.first, self.last = self.here[0] == 0, self.here[-1] == len(stages) - 1
        self.copy = model.copy if isinstance(model, StageModel) else None
        self.layers = [layer for stage in self.here for layer in stages[stage]]
        moe = setting.model.moe
        self.routed = [n for n in self.layers if moe is not None and moe.in_layer(n)]
        self.traffic = Traffic()

    def step(self, micro: MicroBatch, sources: int) -> Traffic:
        """Return the traffic of a whole step, each of its micro-batches like `micro`.

        `sources` is the number of sources that reports are broken down by.
        """
        self.traffic = Traffic()
        self._weights()
        for _ in range(self.batch.accumulation):
            if self.setting.needs_embedding_pass:
                self._through(micro, again=1, back=0)
            self._through(micro, again=self._again, back=1)
            if self.last:
                self._cross_entropy(micro)
                self._balance()
                if not self.setting.needs_embedding_pass:
                    self._contrast(micro.pairs)
        if self.last and self.setting.needs_embedding_pass:
            self._contrast(micro.pairs * self.batch.accumulation)
        self._finish(sources)
        return self.traffic

    def _add(self, axis: str, collective: str, size: int, calls: int = 1) -> None:
        if ranks_of(self.dims, axis) > 1:
            self.traffic.add(traffic_axis(self.dims, axis, collective), collective, size, calls)

    def _weights(self) -> None:
        """FSDP2: a gather and a reduction for each of its modules. What stays gathered until a backward pass serves the
        first of two forward passes too."""
        steps, zero = self.batch.accumulation, self.setting.parallel.zero
        passes = 3 if self.setting.needs_embedding_pass else 2
        units = by_unit(self.shards)
        rooted = "" in units
        for unit, held in units.items():
            axis = held[0].unit.axis
            gathers = {1: 1, 2: steps, 3: passes * steps}[zero]
            if unit == "":  # the root stays gathered for the losses; that of a pipeline stage for the whole step
                gathers = 1 if zero == 1 or self.dims.pp > 1 else steps
            if self.setting.needs_embedding_pass and unit == f"decoder.blocks.{self.layers[-1]}" and not rooted:
                gathers += 1  # FSDP2 prefetches it for a backward pass of the embedding pass, which does not come
            reductions = 1 if zero == 1 else steps
            self._add(axis, "all_gather", sum(shard.gathered * shard.width for shard in held), gathers)
            self._add(axis, "reduce_scatter", sum(shard.gathered for shard in held) * self.wide, reductions)
            self._add("dp_replicate", "all_reduce", sum(shard.chunk for shard in held) * self.wide, reductions)

    @property
    def _positions(self) -> int:
        """B L."""
        return self.batch.micro_batch_positions

    @property
    def _again(self) -> int:
        """Forward passes of a block in a micro-batch."""
        return 1 if self.setting.parallel.activation_checkpointing == "none" else 2

    def _through(self, micro: MicroBatch, again: int, back: int) -> None:
        """A micro-batch `again` times forward through the blocks here, once through the rest, and `back` times back."""
        self._tensor(again, back)
        self._context(again, back)
        self._sequence(again, back)
        self._experts(micro, again, back)
        self._between_stages(back)

    def _there_and_back(self, axis: str, size: int, calls: int, again: int, back: int) -> None:
        """A gather, whose gradient is a reduce-scatter of the same size."""
        self._add(axis, "all_gather", size, calls * again)
        self._add(axis, "reduce_scatter", size, calls * back)

    def _tensor(self, again: int, back: int) -> None:
        model = self.setting.model
        attended = self._positions // self.dims.cp * model.d_model  # [B, M, D]
        dense_layers = len(self.layers) - len(self.routed)
        # What enters attention and a dense network is gathered, what leaves is summed and split; gradients as well.
        self._there_and_back("tp", attended * self.narrow, len(self.layers) + dense_layers, again, back)
        self._add("tp", "reduce_scatter", attended * self.narrow, len(self.layers) * again + dense_layers)
        self._add("tp", "all_gather", attended * self.narrow, (len(self.layers) + dense_layers) * back)
        if self.first:  # the token table: ids are gathered, vectors summed and split
            self._add("tp", "all_gather", self._positions // self.dims.cp * WIDE)
            self._add("tp", "reduce_scatter", attended * self.wide)
            self._add("tp", "all_gather", attended * self.wide, back)

    def _context(self, again: int, back: int) -> None:
        model = self.setting.model
        heads = max(model.n_kv_heads // self.dims.tp, 1)
        elements = self._positions * heads * model.head_width
        for width in (max(self.wide, 4), self.narrow):  # rotated keys are wide, values are not
            self._there_and_back("cp", elements * width, len(self.layers), again, back)

    def _sequence(self, again: int, back: int) -> None:
        model = self.setting.model
        if self.last:
            self._there_and_back("sequence", self._positions * model.d_model * self.narrow, 1, 1, back)
        if model.moe is not None:
            logits = self._positions * model.moe.n_experts * max(self.wide, 4)
            self._add("sequence", "all_gather", logits, len(self.routed) * again)

    @property
    def _fixed_rows(self) -> int | None:
        """Rows that travel and are computed in a layer, whatever is routed; None where they depend on it."""
        moe = self.setting.model.moe
        if moe is None:
            return None
        exchange = parallel_dispatcher_of(moe.dispatcher_class, self.dims.sequence_ranks > 1)
        if not issubclass(exchange, PaddedAllToAllDispatcher):
            return None
        dispatcher = moe.dispatcher_class.from_config(moe)
        return dispatcher.rows(self.batch.micro_batch_sequences, self.batch.sequence_length, moe.top_k)

    def expert_rows(self, micro: MicroBatch) -> int:
        """Count the rows that the experts on this rank compute in a layer of a micro-batch."""
        moe = self.setting.model.moe
        if moe is None:
            return 0
        if (rows := self._fixed_rows) is not None:
            return rows
        here = moe.n_experts // self.dims.ep
        return (
            micro.received
            if moe.token_group_alignment == 1
            else rounded_up(micro.received + here * (moe.token_group_alignment - 1), moe.token_group_alignment)
        )

    def _experts(self, micro: MicroBatch, again: int, back: int) -> None:
        moe, model, layers = self.setting.model.moe, self.setting.model, len(self.routed)
        if moe is None:
            return
        row = model.d_model * self.narrow
        if (fixed := self._fixed_rows) is not None:
            self._add("ep", "all_to_all", fixed * row, 2 * layers * (again + back))
            return
        self._add("ep", "all_to_all", moe.n_experts * WIDE, layers * again)
        for rows in (micro.sent, micro.received):
            self._add("ep", "all_to_all", rows * row, layers * (again + back))

    def _between_stages(self, back: int) -> None:
        """Hidden states and, with experts, the router losses: to the next stage, and their gradients back."""
        setting = self.setting
        hidden = self._positions // self.dims.sequence_ranks * setting.model.d_model
        levels = len(router_losses(setting.losses.load_balance))
        stages = self.dims.pp * setting.parallel.stages_per_rank
        for stage in self.here:
            for size in (hidden, *([levels] if setting.model.moe is not None and back else [])):
                after, before = int(stage < stages - 1), int(stage > 0)
                self._add("pp", "send", size * self.wide, after + back * before)
                self._add("pp", "receive", size * self.wide, before + back * after)

    def _cross_entropy(self, micro: MicroBatch) -> None:
        """A chunk of labels at a time, once more in the backward pass."""
        width, chunk = max(self.wide, 4), self.setting.losses.ce.chunk
        for labels in [chunk] * (micro.labels // chunk) + [micro.labels % chunk]:
            if labels:
                self._add("tp", "all_reduce", labels * width, 2)
                self._add("tp", "all_reduce", 2 * labels * width, 2)

    def _contrast(self, pairs: int) -> None:
        """The embeddings of so many pairs here, and those of all who have pairs of the same groups."""
        within = self.setting.scope is ContrastiveScope.MICRO_BATCH
        if within and self.dims.sequence_ranks == 1:
            return
        axis = "sequence" if within else "loss"
        ranks, width = ranks_of(self.dims, axis), max(self.wide, 4)
        self._add(axis, "all_gather", ranks * WIDE, 2)  # how many pairs, for each of the two below
        self._add(axis, "all_gather", ranks * pairs * 2 * WIDE)  # groups and captions
        self._there_and_back(axis, ranks * pairs * 2 * self.setting.model.contrast_dim * width, 1, 1, 1)

    def _balance(self) -> None:
        moe = self.setting.model.moe
        if moe is not None and self.setting.losses.load_balance.global_batch and self.routed:
            self._add("data", "all_reduce", len(self.routed) * moe.n_experts * WIDE)

    def _finish(self, sources: int) -> None:
        """Gradients of what tp has copies of, the norm, and the reports."""
        tied = self.setting.model.tie_embeddings and (self.first or self.copy is not None)
        for collective in ("send", "receive") if tied else ():  # between the first stage's table and the last one's
            self._add("pp", collective, sum(s.held(self.place) for s in self.shards if s.name == TIED) * self.wide)
        self._add("tp", "all_reduce", sum(s.held(self.place) for s in self.shards if s.copied) * self.wide)
        moe, model = self.setting.model.moe, self.setting.model
        layers = sum(map(moe.in_layer, range(model.n_layers))) if moe is not None else 0
        experts = moe.n_experts if moe is not None else 0
        self._add("all", "all_reduce", (1 + layers * experts) * WIDE)
        kinds = len(Modality)
        self._add("all", "all_reduce", report_size(self.setting.loss_terms, sources) * WIDE)
        if layers:
            table = 2 * kinds * sources * experts + len(CAPACITY_FACTORS) + 2 + 3 * experts
            self._add("all", "all_reduce", layers * table * WIDE)
