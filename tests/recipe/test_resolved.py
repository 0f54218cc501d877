"""What follows from a config depends on the number of processes where it should, and is refused where it cannot be."""

import pytest

from mmoe.config.load import load
from mmoe.data.plan.assignment import ContrastiveScope
from mmoe.errors import ConfigError
from mmoe.parallel.mesh import ParallelDims
from mmoe.recipe.config import RunConfig
from mmoe.recipe.resolved import ResolvedRun
from tests.conftest import REPOSITORY

SPREAD = ["parallel.ep=2", "optim.lr.peak=1e-3", "training.global_batch_positions=8448"]  # 8 sequences


def demo(*overrides: str) -> RunConfig:
    return load(RunConfig, REPOSITORY / "configs" / "demo.yaml", [*SPREAD, *overrides])


def test_one_process_without_a_group_does_all_whatever_the_degrees_are() -> None:
    alone = ResolvedRun.from_config(demo())
    assert alone.dims == ParallelDims() and alone.batch.replicas == 1
    with pytest.raises(ConfigError, match="parallel.ep is 2, which does not divide"):
        ResolvedRun.from_config(demo(), 1)


def test_the_steps_and_the_rates_of_a_run_do_not_depend_on_its_ranks() -> None:
    one, two = ResolvedRun.from_config(demo()), ResolvedRun.from_config(demo(), 2)
    assert two.dims == ParallelDims(dp_shard=2, ep=2)
    assert (one.batch.micro_batch_sequences, two.batch.micro_batch_sequences) == (8, 4)
    assert (one.schedule, one.contrastive_group) == (two.schedule, two.contrastive_group)
    assert one.batch.iterations == two.batch.iterations


@pytest.mark.parametrize(
    ("group", "scope"),
    [(2, ContrastiveScope.MICRO_BATCH), (4, ContrastiveScope.MICRO_STEP), (8, ContrastiveScope.STEP)],
    ids=str,
)
def test_all_is_embedded_first_where_a_group_is_wider_than_a_micro_step(group: int, scope: ContrastiveScope) -> None:
    overrides = ["training.micro_batch_sequences=2", f"losses.contrastive.group_sequences={group}"]
    run = ResolvedRun.from_config(demo(*overrides), 2)
    assert run.scope is scope and run.needs_embedding_pass is (scope is ContrastiveScope.STEP)
    assert not ResolvedRun.from_config(demo(*overrides, "losses.contrastive.weight=0"), 2).needs_embedding_pass


def test_a_batch_that_replicas_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a multiple of .* 3 data replicas"):
        ResolvedRun.from_config(demo("parallel.ep=1", "training.micro_batch_sequences=1", "model.moe=null"), 3)
