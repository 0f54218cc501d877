"""In bfloat16 a layout has the gradients of one process as far as both round the same sums.

Where the micro-batches hold the same sequences and nothing is summed over ranks in front of a bfloat16 rounding, only
float32 sums differ. Where a product has other rows (another deal of sequences, experts or positions of several ranks)
or a float32 sum over ranks is rounded to bfloat16 afterwards, roundings flip, by 2^-9 of an element each: a layout is
then as far from one process as one process is from itself with other micro-batches, and much nearer than both are to
float64.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.distributed.compare import one_process
from tests.distributed.pool import Pool
from tests.distributed.step import Case, run_step

MOE = {"layer_freq": 1, "router_noise": 0.0, "n_shared_experts": 1}
ALONE = {"contrastive": {"weight": 0.3, "group_sequences": 1}}  # no sum over sequences before the last
CASE = Case(compute="bfloat16", sequences=4, losses=ALONE, model={"n_layers": 3, "moe": MOE})


def distance(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By gradient, relative."""
    pairs = ((name, value.astype(np.float64), other["gradients"][name]) for name, value in one["gradients"].items())
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in pairs if np.linalg.norm(b)}


SLOW = [{"dp_replicate": 2}, {"activation_checkpointing": "full"}, {"zero": 1}]


@pytest.mark.parametrize("gate", [pytest.param(False, marks=pytest.mark.slow), True], ids=["shared", "gated"])
@pytest.mark.parametrize(
    "parallel", [{}, {"pp": 2}, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW)], ids=str
)
def test_the_same_micro_batches_give_the_same_gradients(two: Pool, parallel: dict[str, Any], gate: bool) -> None:
    case = replace(CASE, model={"n_layers": 4, "moe": {**MOE, "shared_gate": gate}})
    found = two.run(run_step, replace(case, parallel=parallel), 2)[0]
    assert max(distance(found, one_process(case)).values()) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"ep": 2}, {"cp": 2}], ids=str)
def test_other_products_flip_roundings_within_what_bfloat16_costs_anyway(two: Pool, parallel: dict[str, Any]) -> None:
    """Contrastive groups of the whole batch, micro-batches of two: dealt otherwise, or summed over ranks.

    Without tp, which rounds hidden states otherwise, so that a token near a tie chooses another expert.
    """
    case = replace(CASE, micro=2, sequences=8, losses={})
    own, exact = one_process(case), one_process(replace(case, compute="float64"))
    found = two.run(run_step, replace(case, parallel=parallel), 2)[0]
    rounding, apart = distance(own, exact), distance(found, own)
    assert max(distance(found, exact).values()) < 1.2 * max(rounding.values())
    assert max(apart.values()) < 0.2 * max(rounding.values())
