"""The arithmetic of the degrees, and one sentence for each product that cannot be."""

import io
import sys
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.commands.console import Console
from mmoe.errors import ConfigError
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import DENSE_AXES, ParallelDims, check_one_process

small = st.integers(1, 6)


@given(st.fixed_dictionaries(dict.fromkeys(DENSE_AXES, small)), st.integers(1, 8), st.booleans())
def test_degrees_multiply_to_the_processes(dims: dict[str, int], ep: int, rest: bool) -> None:
    world = prod(dims.values())
    lent = dims["dp_shard"] * dims["cp"] * dims["tp"]
    config = ParallelConfig(**dims | ({"dp_shard": -1} if rest else {}), ep=ep)
    if lent % ep:
        with pytest.raises(ConfigError, match=f"parallel.ep is {ep}, which does not divide .* = {lent} ranks"):
            ParallelDims.from_config(config, world)
        return
    found = ParallelDims.from_config(config, world)
    assert found == ParallelDims(**dims, ep=ep) and found.world == world
    assert found.pp * found.dp_replicate * found.edp * found.ep == world
    assert found.pp * found.replicas * found.sequence_ranks == world
    assert found.pp * found.dp_replicate * found.fsdp * found.tp == world


@given(st.fixed_dictionaries(dict.fromkeys(DENSE_AXES, small)), st.integers(1, 200))
def test_any_other_number_of_processes_is_refused_with_the_arithmetic(dims: dict[str, int], world: int) -> None:
    product = prod(dims.values())
    if world != product:
        with pytest.raises(ConfigError) as caught:
            ParallelDims.from_config(ParallelConfig(**dims), world)
        assert f"dp_shard {dims['dp_shard']} = {product}" in str(caught.value)
        assert f"there are {world} processes" in str(caught.value)
    others = product // dims["dp_shard"]
    if world % others:
        with pytest.raises(ConfigError, match=f"= {others} does not divide {world}; .* or start ") as caught:
            ParallelDims.from_config(ParallelConfig(**dims | {"dp_shard": -1}), world)
        advised = int(str(caught.value).split("start ")[1].split()[0])
        assert ParallelDims.from_config(ParallelConfig(**dims | {"dp_shard": -1}), advised).world == advised


def test_the_sentences_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelDims.from_config(ParallelConfig(tp=3, pp=2, dp_shard=2), 8)
    assert str(caught.value) == (
        "parallel: pp 2 x dp_replicate 1 x cp 1 x tp 3 x dp_shard 2 = 12, but there are 8 processes; change a degree, "
        "set dp_shard to -1 (the rest), or start 12 processes with torchrun --nproc-per-node"
    )
    with pytest.raises(ConfigError) as caught:
        ParallelDims.from_config(ParallelConfig(tp=2, ep=3), 4)
    assert str(caught.value) == (
        "parallel.ep is 3, which does not divide the dp_shard 2 x cp 1 x tp 2 = 4 ranks that it borrows; "
        "change one of them"
    )


def test_the_table_shows_every_axis_and_what_ep_borrows() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(ParallelDims(pp=2, dp_replicate=3, dp_shard=4, cp=5, tp=7, ep=10).table())
    text = " ".join(console.export_text().split())
    assert "840" in text and "2 x 3 x 4 x 5 x 7" in text and "dp_shard x cp x tp = 140" in text


@pytest.mark.parametrize(
    "dims, ranks, named",
    [
        ({"tp": 2, "pp": 2}, 4, "parallel.pp=2, parallel.tp=2"),
        ({"ep": 4, "cp": 2}, 4, "parallel.cp=2, parallel.ep=4"),
        ({"dp_shard": 3}, 3, "parallel.dp_shard=3"),
        ({"dp_shard": 1, "ep": 2}, 2, "parallel.ep=2"),
    ],
)
def test_degrees_without_torchrun_name_the_command(
    monkeypatch: pytest.MonkeyPatch, dims: dict[str, int], ranks: int, named: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmoe", "train", "a b.yaml"])
    with pytest.raises(ConfigError) as error:
        check_one_process(ParallelConfig(**dims))
    assert str(error.value).startswith(f"{named} needs several processes")
    assert str(error.value).endswith(f"torchrun --nproc-per-node {ranks} -m mmoe train 'a b.yaml'")
