"""After five optimizer steps every layout has the weights of one process."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.compare import differences
from tests.distributed.pool import Pool
from tests.distributed.step import Case, train

STEPS = 5
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # Adam divides by gradients, which makes small ones' errors larger
MOE = {"capacity_factor": 1.0, "bias_rate": 0.01}


def check_weights(pool: Pool, case: Case, muon: bool, tolerance: float) -> None:
    expected = train(replace(case, parallel={}), 1, muon, STEPS)
    first = train(replace(case, parallel={}), 1, muon, 0)
    assert differences("moved", first, expected, 1e-3)
    weights = pool.run(train, case, pool.world, muon, STEPS)[0]
    assert not (found := differences("after five steps", weights, expected, tolerance)), "\n".join(found)


@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize(
    "parallel", [{}, {"ep": 2}, {"tp": 2}, {"cp": 2}, {"zero": 1}, {"offload": True}, {"dp_replicate": 2}], ids=str
)
def test_adamw_on_two_ranks(two: Pool, parallel: dict[str, Any], compute: str) -> None:
    check_weights(two, Case(compute, 2, model={"moe": MOE}, parallel=parallel), False, TOLERANCE[compute])


@pytest.mark.parametrize("parallel", [{"ep": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_adamw_on_four_ranks(four: Pool, parallel: dict[str, Any]) -> None:
    check_weights(four, Case(model={"moe": MOE}, parallel=parallel), False, TOLERANCE["float64"])


@pytest.mark.parametrize("parallel", [{}, {"ep": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_muon_on_two_ranks(two: Pool, parallel: dict[str, Any]) -> None:
    check_weights(two, Case(micro=2, model={"moe": MOE}, parallel=parallel), True, TOLERANCE["float64"])


@pytest.mark.parametrize("parallel", [{"tp": 2, "ep": 2}, {"dp_replicate": 2, "ep": 2}], ids=str)
def test_muon_on_four_ranks(four: Pool, parallel: dict[str, Any]) -> None:
    check_weights(four, Case(model={"moe": MOE}, parallel=parallel), True, TOLERANCE["float64"])
