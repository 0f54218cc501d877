"""Says which layers and heads are on which rank, as the stages of a pipeline.

A stage is a run of layers. Stage s is on rank s % pp of the axis, so that with several stages a rank every rank gets
early and late layers (Narayanan et al. 2021, section 2.2). The embeddings go with the first stage, the last norm and
all heads with the last one; a token table that is also the unembedding is on both.
"""

from collections.abc import Mapping
from functools import cache
from itertools import accumulate, pairwise

import torch
from rich.table import Table
from torch import Tensor, nn

from mmoe.errors import ConfigError
from mmoe.models.batch_context import BatchContext
from mmoe.models.decoder import ModelConfig, ModelOutput, MultimodalModel, collect_routing
from mmoe.models.embeddings import ModelInputs
from mmoe.models.moe.layer import MoELayer
from mmoe.parallel.setting import RankSetting
from mmoe.parallel.tensor import check_vocabulary
from mmoe.schema.batch import PackedBatch

TIED = "embeddings.token.weight"


class StageModel(MultimodalModel):
    """Holds the stages of one rank of pp: parameters that belong elsewhere are not there, the others keep their names.

    ``layers[s]`` are the layers of stage s of the whole model, ``here`` the stages of this rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: ModelInputs,
        stages: int,
        ranks: int,
        rank: int,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(config, inputs, heads)
        self.costs = costs(self)
        self.layers = deal_layers(self.costs, stages)
        self.here = range(rank, stages, ranks)
        self.tied = config.tie_embeddings
        kept = {layer for stage in self.here for layer in self.layers[stage]}
        for layer in range(config.n_layers):
            if layer not in kept:
                self.decoder.blocks[layer] = nn.Identity()
        if not self.is_last(self.here[-1]):
            self.decoder.norm = nn.Identity()
            self.unembedding = self.action = None
            self.register_module("contrastive", None)
            self.heads = nn.ModuleDict()
        if self.here[0] > 0:
            self._keep_table()

    def is_last(self, stage: int) -> bool:
        """Return whether the stage is the last one of the whole model."""
        return stage == len(self.layers) - 1

    @property
    def copy(self) -> str | None:
        """The name of the parameter here that is a copy of the first stage's; None where there is none."""
        return TIED if self.here[0] > 0 and self.embeddings is not None else None

    def _keep_table(self) -> None:
        """Keep of the embeddings what the head needs."""
        if self.tied and self.is_last(self.here[-1]):
            self.embeddings.register_module("camera", None)
            self.embeddings.register_module("time", None)
            self.embeddings.values = nn.ModuleDict()
        else:
            self.register_module("embeddings", None)

    def forward(  # type: ignore[override]  # a stage is called by its `Pipeline` alone
        self, stage: int, context: BatchContext, entering: PackedBatch | Tensor
    ) -> ModelOutput:
        """Run one `stage`, from the batch (of the positions here) or from the hidden states of the stage before.

        `routing` and the router losses are of this stage's own layers, means over them.
        """
        x_BLD = self.embeddings(entering) if isinstance(entering, PackedBatch) else entering
        x_BLD, routed = self.decoder.run_layers(x_BLD, context, self.layers[stage])
        return ModelOutput(self.decoder.norm(x_BLD) if self.is_last(stage) else x_BLD, *collect_routing(routed))

    def table(self, ranks: int, micro_batches: int) -> Table:
        """Make the table of the stages, to be printed at the start of a run."""
        table = Table("stage", "rank of pp", "layers", "work", title_justify="left")
        total = sum(self.costs)
        for stage, layers in enumerate(self.layers):
            share = sum(self.costs[layers.start : layers.stop]) / total
            table.add_row(str(stage), str(stage % ranks), f"{layers.start} to {layers.stop - 1}", f"{share:.1%}")
        # The share of a step in which a rank waits, were all stages equal (Narayanan et al. 2021, section 2.2).
        idle = (ranks - 1) / (len(self.here) * micro_batches + ranks - 1)
        table.caption = f"{micro_batches} micro-batches a step leave a rank idle for {idle:.0%} of it"
        return table


def check_pipeline_stages(layers: int, each: int, pp: int, micro_batches: int) -> None:
    """Raise ConfigError where the layers or the micro-batches do not fit `pp` ranks with `each` so many stages."""
    if pp * each > layers:
        raise ConfigError(
            f"parallel.pp {pp} x parallel.stages_per_rank {each} = {pp * each} stages, but model.n_layers is {layers} "
            "and every stage needs one; lower parallel.pp or parallel.stages_per_rank"
        )
    rounds = max(1, micro_batches // pp)
    if each > 1 and micro_batches % rounds:
        raise ConfigError(
            f"a step has {micro_batches} micro-batches, which parallel.schedule interleaved_1f1b cannot cut into "
            f"{rounds} equal rounds of at least parallel.pp {pp}; make them a multiple of {pp} with "
            "training.micro_batch_sequences, or set schedule to 1f1b and stages_per_rank to 1"
        )


def costs(model: MultimodalModel) -> list[float]:
    """Estimate the work of each layer by the weights that a position is multiplied with.

    The first has the embeddings' too, the last the unembedding's. Attention scores are left out: they are the same in
    every layer.
    """
    layers = [_active(block) for block in model.decoder.blocks]
    tables = (model.embeddings.token, model.embeddings.camera)  # looked up
    layers[0] += _active(model.embeddings) - sum(table.weight.numel() for table in tables)
    layers[-1] += model.unembedding_weight.numel()
    return layers


def _active(module: nn.Module) -> float:
    """Count parameters, of experts those that a token goes through."""
    total = float(sum(p.numel() for p in module.parameters()))
    for layer in module.modules():
        if isinstance(layer, MoELayer):
            experts = sum(p.numel() for p in layer.experts.parameters())
            total -= experts * (1 - layer.router.top_k / layer.router.weight.shape[0])
    return total


def deal_layers(costs: list[float], stages: int) -> list[range]:
    """Deal the layers to stages: runs of layers, none empty, of which the costliest is as cheap as can be."""
    before = [0.0, *accumulate(costs)]

    @cache
    def best(stop: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The cost of the costliest of so many stages of the layers before `stop`, and where they start."""
        if stages == 1:
            return before[stop], (0,)
        cuts = []
        for start in range(stages - 1, stop):
            costliest, starts = best(start, stages - 1)
            cuts.append((max(costliest, before[stop] - before[start]), (*starts, start)))
        return min(cuts)

    _, starts = best(len(costs), stages)
    return [range(start, stop) for start, stop in pairwise((*starts, len(costs)))]


def on_meta(setting: RankSetting, inputs: ModelInputs, pp_rank: int) -> MultimodalModel:
    """Make the model, or the stages of one rank of pp, without memory. Raises ConfigError where it cannot be spread."""
    dims = setting.dims
    check_vocabulary(inputs.vocabulary_size, dims.tp, dims.fsdp)
    with torch.device("meta"):
        heads = setting.heads(inputs)
        if dims.pp == 1:
            model = MultimodalModel(setting.model, inputs, heads)
        else:
            stages = dims.pp * setting.parallel.stages_per_rank
            model = StageModel(setting.model, inputs, stages, dims.pp, pp_rank, heads)
    return model.to(setting.precision.parameter_dtype)
