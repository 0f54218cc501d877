"""Layouts that a model cannot take are refused before any process group is needed, in one sentence."""

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from mmoe.config.load import validate
from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelConfig
from mmoe.parallel.mesh import ParallelDims
from mmoe.parallel.parallelize import check_layout
from mmoe.parallel.sequence import PIECES, check_length
from mmoe.parallel.tensor import check_vocabulary
from tests.distributed.step import MODEL


def model(**changes: Any) -> ModelConfig:
    return validate(ModelConfig, {**MODEL, **changes}, "test")


@pytest.mark.parametrize(
    ("dims", "changes", "sentence"),
    [
        ({"tp": 3}, {}, "model.n_heads is 4, not a multiple of parallel.tp 3; change it, or parallel.tp"),
        (
            {"tp": 2},
            {"n_heads": 6, "n_kv_heads": 3, "head_dim": 8},
            "model.n_kv_heads is 3, neither a multiple nor a divisor of parallel.tp 2; change it, or parallel.tp",
        ),
        (
            {"tp": 4},
            {"intermediate_size": 50},
            "model.intermediate_size is 50, not a multiple of parallel.tp 4; change it, or parallel.tp",
        ),
        (
            {"cp": 2},
            {"attention": "dense"},
            "parallel.cp is 2, but model.attention is dense, which has no form for positions of several ranks; "
            "set it to .*sdpa_documents, or parallel.cp to 1",  # and what tests have registered
        ),
        ({"ep": 2}, {"moe": None}, "parallel.ep is 2, but the model has no experts; set it to 1"),
        (
            {"dp_shard": 8, "ep": 8},
            {},
            "parallel.ep is 8, which does not divide the 4 experts of model.moe; lower it to a divisor",
        ),
        (
            {"dp_shard": 3, "ep": 3},
            {},
            "parallel.ep is 3, which does not divide the 4 experts of model.moe; lower it to a divisor",
        ),
        (
            {"dp_shard": 6, "ep": 2},
            {},
            "model.d_model is 32, which the 3 ranks that share an expert (dp_shard x cp x tp / ep) do not divide; "
            "raise parallel.ep, or use dp_replicate for some of dp_shard",
        ),
        (
            {"dp_shard": 16, "cp": 2},
            {"moe": {**MODEL["moe"], "intermediate_size": 48}},
            "model.moe.intermediate_size is 48, which the 32 ranks that share an expert (dp_shard x cp x tp / ep) do "
            "not divide; raise parallel.ep, or use dp_replicate for some of dp_shard",
        ),
    ],
)
def test_a_layout_that_the_model_cannot_take(dims: dict[str, int], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(model(**changes), ParallelDims(**dims))
    assert re.fullmatch(re.escape(sentence).replace(re.escape(".*"), ".*"), str(caught.value))


def test_a_vocabulary_that_two_kinds_of_shards_would_cut_differently() -> None:
    """What FSDP2 holds of tp's part, against what DTensor says that (_StridedShard, Shard) holds."""
    for size, tp, fsdp in product(range(80, 100), (2, 4), (2, 3, 4)):
        mesh = {"mesh_shape": (fsdp, tp), "placements": [_StridedShard(0, split_factor=tp), Shard(0)]}
        differ = False
        for place in product(range(fsdp), range(tp)):
            shape, _ = _compute_local_shape_and_global_offset((size,), my_coordinate=place.__getitem__, **mesh)
            differ |= shape[0] != part(part(size, tp, place[1]), fsdp, place[0])
        if differ:
            with pytest.raises(ConfigError, match=f"{size} ids, not a multiple of parallel.tp {tp}.*{-size % tp} more"):
                check_vocabulary(size, tp, fsdp)
        elif size % tp == 0 or fsdp == 2:
            check_vocabulary(size, tp, fsdp)


def part(size: int, parts: int, number: int) -> int:
    """Of `size` in equal parts, rounded up."""
    each = -(-size // parts)
    return max(0, min(each, size - number * each))


@pytest.mark.parametrize("dims", [{"tp": 4}, {"dp_shard": 4, "ep": 4}, {"dp_shard": 8, "tp": 2}, {"cp": 8}], ids=str)
def test_a_layout_that_it_can_take(dims: dict[str, int]) -> None:
    check_layout(model(), ParallelDims(**dims))


@given(st.integers(1, 600), st.integers(1, 5), st.integers(1, 5))
def test_the_length_is_shared_evenly_or_refused(length: int, cp: int, tp: int) -> None:
    unit = tp * (cp * PIECES if cp > 1 else 1)
    if length % unit:
        with pytest.raises(ConfigError, match=f"data.sequence_length is {length}, .* a multiple of {unit}, or"):
            check_length(length, cp, tp)
    else:
        check_length(length, cp, tp)
