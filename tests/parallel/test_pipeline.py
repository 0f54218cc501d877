"""Which layers and heads are on which stage, and what is refused before a pipeline starts."""

from io import StringIO
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from mmoe.commands.console import Console
from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.parallel.pipeline import TIED, StageModel, check_pipeline_stages, costs, deal_layers
from tests.models.random_batch import INPUTS

CONFIG = ModelConfig.model_validate(
    {"d_model": 16, "n_layers": 6, "n_heads": 2, "n_kv_heads": 2, "intermediate_size": 32}
    | {"moe": {"n_experts": 4, "top_k": 2, "intermediate_size": 16, "layer_freq": 2, "expert_backend": "loop"}}
)


def stage_models(config: ModelConfig, ranks: int, each: int) -> list[StageModel]:
    with torch.device("meta"):
        return [StageModel(config, INPUTS, ranks * each, ranks, rank) for rank in range(ranks)]


def names(model: MultimodalModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("ranks", "each"), [(2, 1), (3, 1), (6, 1), (2, 2), (2, 3), (3, 2)])
def test_ranks_share_the_parameters_of_the_whole_model_by_name(ranks: int, each: int, tied: bool) -> None:
    """Each is on one rank, but a table that is also the unembedding on the first and the last."""
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    with torch.device("meta"):
        whole = {name: p.shape for name, p in MultimodalModel(config, INPUTS).named_parameters()}
    models = stage_models(config, ranks, each)
    held = [name for model in models for name in names(model)]
    assert sorted(held) == sorted([*whole, *([TIED] if tied else [])])
    assert all(p.shape == whole[name] for model in models for name, p in model.named_parameters())
    assert [model.copy for model in models] == [None] * (ranks - 1) + [TIED if tied else None]
    assert all(name.startswith(("embeddings.", "decoder.blocks.")) for name in names(models[0]))
    assert TIED in names(models[0])
    assert {"decoder.norm.weight", "action.output.weight"} <= set(names(models[-1]))


def test_stages_of_a_rank_are_as_far_apart_as_there_are_ranks() -> None:
    first, second = stage_models(CONFIG, 2, 3)
    assert (list(first.here), list(second.here)) == ([0, 2, 4], [1, 3, 5])
    assert [model.layers for model in (first, second)] == [[range(n, n + 1) for n in range(6)]] * 2
    assert not second.is_last(3) and second.is_last(5)


def test_layers_are_dealt_so_that_the_costliest_stage_is_as_cheap_as_can_be() -> None:
    random = np.random.default_rng(4)
    for _ in range(30):
        layers, stages = int(random.integers(4, 9)), int(random.integers(1, 5))
        work = [float(cost) for cost in random.integers(1, 30, layers)]
        dealt = deal_layers(work, stages)
        assert [layer for part in dealt for layer in part] == list(range(layers))
        assert all(dealt) and len(dealt) == stages
        found = max(sum(work[layer] for layer in part) for part in dealt)
        every_cut = [(0, *cuts, layers) for cuts in combinations(range(1, layers), stages - 1)]
        assert found == min(max(sum(work[a:b]) for a, b in pairwise(cut)) for cut in every_cut)


def test_a_stage_with_a_large_head_has_fewer_layers() -> None:
    assert deal_layers([1.0] * 7 + [4.0], 2) == [range(5), range(5, 8)]


def test_costs_count_what_a_token_goes_through() -> None:
    with torch.device("meta"):
        model = MultimodalModel(CONFIG, INPUTS)
    attention, norms = 4 * 16 * 16, 2 * 16
    dense, routed = 3 * 16 * 32, 2 * 3 * 16 * 16 + 4 * 16  # two experts of four, and the router
    work = costs(model)
    assert work[1:5] == [attention + norms + network for network in (routed, dense, routed, dense)]
    assert work[5] == attention + norms + routed + INPUTS.vocabulary_size * 16
    tables = INPUTS.vocabulary_size * 16 + model.embeddings.camera.weight.numel()
    embeddings = sum(p.numel() for p in model.embeddings.parameters()) - tables
    assert work[0] == attention + norms + dense + embeddings


def test_too_few_layers_are_refused() -> None:
    check_pipeline_stages(layers=4, each=1, pp=4, micro_batches=4)
    with pytest.raises(ConfigError, match=r"pp 4 x parallel.stages_per_rank 1 = 4 stages, but model.n_layers is 3"):
        check_pipeline_stages(layers=3, each=1, pp=4, micro_batches=4)
    with pytest.raises(ConfigError, match=r"pp 2 x parallel.stages_per_rank 2 = 4 stages, but model.n_layers is 3"):
        check_pipeline_stages(layers=3, each=2, pp=2, micro_batches=4)


@pytest.mark.parametrize("micro_batches", range(1, 12))
def test_micro_batches_that_do_not_make_whole_rounds_are_refused(micro_batches: int) -> None:
    check_pipeline_stages(layers=6, each=1, pp=3, micro_batches=micro_batches)
    if micro_batches in (7, 10, 11):
        with pytest.raises(ConfigError, match=f"a step has {micro_batches} micro-batches.*micro_batch_sequences"):
            check_pipeline_stages(layers=6, each=2, pp=3, micro_batches=micro_batches)
    else:
        check_pipeline_stages(layers=6, each=2, pp=3, micro_batches=micro_batches)


def test_the_table_says_where_layers_are_and_how_long_ranks_wait() -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(stage_models(CONFIG, 2, 1)[1].table(2, 3))
    text = console.export_text()
    assert "0 to 2" in text and "3 to 5" in text
    assert "idle for 25% of it" in text  # one of four slots
