"""The batch arithmetic of the recipes, table by table."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.commands.console import Console
from mmoe.errors import ConfigError
from mmoe.optim.batch import BatchArithmetic
from mmoe.parallel.config import ParallelConfig
from mmoe.parallel.mesh import ParallelDims

TRILLION = 10**12


def arithmetic(length: int, sequences: int | None, size: int, replicas: int, budget: int = TRILLION) -> BatchArithmetic:
    return BatchArithmetic.from_config(
        sequence_length=length,
        micro_batch_sequences=sequences,
        global_batch_positions=size,
        budget_positions=budget,
        replicas=replicas,
    )


@pytest.mark.parametrize(("power", "iterations"), [(20, 953_674), (21, 476_837), (22, 238_418)])
def test_iterations_of_a_trillion_positions(power: int, iterations: int) -> None:
    assert arithmetic(4096, 1, 2**power, 1).iterations == iterations


def test_worked_example() -> None:
    replicas = ParallelDims.from_config(ParallelConfig(tp=4), 64).replicas
    batch = arithmetic(4096, 4, 4_194_304, replicas)
    assert (replicas, batch.micro_batch_positions, batch.accumulation) == (16, 16_384, 16)


@pytest.mark.parametrize(
    ("length", "sequences", "size", "micro", "accumulation"),
    [
        (4096, 8, 2_097_152, 32_768, 8),  # 3B
        (4096, 4, 4_194_304, 16_384, 32),  # 7B
        (4096, 2, 4_194_304, 8_192, 64),  # 13B
        (8192, 4, 2_097_152, 32_768, 8),
        (8192, 2, 4_194_304, 16_384, 32),
        (8192, 1, 4_194_304, 8_192, 64),
    ],
)
def test_dense_family_on_64_gpus(length: int, sequences: int, size: int, micro: int, accumulation: int) -> None:
    """With tensor parallel 8 only 8 replicas see different data: not the source's A = 1, 4, 8 but 8 times that."""
    batch = arithmetic(length, sequences, size, ParallelDims.from_config(ParallelConfig(tp=8), 64).replicas)
    assert (batch.micro_batch_positions, batch.accumulation) == (micro, accumulation)


@given(
    length=st.integers(1, 10**4),
    sequences=st.integers(1, 64),
    accumulation=st.integers(1, 64),
    replicas=st.integers(1, 256),
    extra=st.integers(0, 10**9),
)
def test_factors_multiply_and_round_down(
    length: int, sequences: int, accumulation: int, replicas: int, extra: int
) -> None:
    size = length * sequences * accumulation * replicas
    batch = arithmetic(length, sequences, size, replicas, budget=size + extra)
    assert (batch.accumulation, batch.global_batch_positions) == (accumulation, size)
    assert batch.sequences * length == size
    assert batch.iterations * size <= size + extra < (batch.iterations + 1) * size


def test_a_batch_that_does_not_divide_names_the_keys_and_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError) as error:
        arithmetic(512, 4, 5000, 2)
    for part in ("training.global_batch_positions 5000", "data.sequence_length", "set it to 4096 or 8192"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="set it to 4096, or"):
        arithmetic(512, 4, 1024, 2)


def test_without_a_micro_batch_it_is_all_of_a_replicas_share() -> None:
    assert arithmetic(512, None, 8192, 4) == arithmetic(512, 4, 8192, 4)
    assert arithmetic(512, None, 8192, 4).accumulation == 1
    with pytest.raises(ConfigError, match="1536, the positions of one sequence on every replica .512 .* x 3 data rep"):
        arithmetic(512, None, 8192, 3)


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="training.budget_positions 100 is less than one step"):
        arithmetic(512, 4, 4096, 2, budget=100)


def test_the_table_shows_every_factor() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(arithmetic(4096, 4, 4_194_304, 16).table())
    text = console.export_text()
    for part in ("mu_tok", "16,384", "GB_tok", "4,194,304", "238,418", "1,000,000,000,000 positions // GB_tok"):
        assert part in text
