"""A step of many ranks against the same step of one process."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from tests.distributed.pool import Pool
from tests.distributed.step import Case, run_step

TOLERANCE = {"float64": 1e-11, "float32": 1e-5}  # relative
REPORTED = ("loss", "norm", "terms", "events", "items", "routing", "loads", "router_norms")


def check(pool: Pool, case: Case, micro: int | None = None) -> dict[str, Any]:
    """The step of one process, in micro-batches of `micro`, after checking that every rank of `pool` has all of it."""
    expected = one_process(replace(case, parallel={}, micro=micro or case.micro))
    outcomes = pool.run(run_step, case, pool.world)
    found: list[str] = []
    for rank, outcome in enumerate(outcomes):
        names = REPORTED if rank else (*REPORTED, "gradients")
        for name in names:
            found += differences(f"rank {rank}: {name}", outcome[name], expected[name], TOLERANCE[case.compute])
    assert not found, "\n".join(found)
    return expected


def one_process(case: Case) -> dict[str, Any]:
    return _one_process(repr(case))


@functools.cache
def _one_process(case: str) -> dict[str, Any]:
    return run_step(eval(case, {"Case": Case}), 1)


def differences(name: str, got: Any, expected: Any, tolerance: float) -> list[str]:
    """A sentence for each leaf that differs by more than `tolerance` of its largest element; counts must be equal."""
    if isinstance(expected, dict):
        if got.keys() != expected.keys():
            return [f"{name} has {sorted(got)} instead of {sorted(expected)}"]
        return [text for key in expected for text in differences(f"{name}.{key}", got[key], expected[key], tolerance)]
    a, b = np.asarray(got), np.asarray(expected)
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return [f"{name} is {a.dtype} {a.shape} instead of {b.dtype} {b.shape}"]
    if a.dtype.kind not in "fc":
        return [] if np.array_equal(a, b) else [f"{name} differs in {np.sum(a != b)} of {a.size} places"]
    error, size = (float(np.abs(x).max(initial=0.0)) for x in (a - b, b))
    return [] if error <= tolerance * size else [f"{name} differs by {error / size if size else error:.2g}"]
