"""Inputs damaged on purpose: each gives a result or an error meant for the user; no signal, no hang, bounded memory.

`MMOE_FUZZ_INPUTS` sets how many of each kind the slow test tries; ``python -m tests.fuzz.harness TARGET`` does the same
by hand.
"""

import os

import pytest

from tests.fuzz.harness import campaign

TARGETS = ("tables", "audio", "images", "videos", "shards", "datasets", "rlds", "rows")
QUICK, MANY = 60, int(os.environ.get("MMOE_FUZZ_INPUTS", 2500))


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_gives_a_result_or_a_typed_error(target: str) -> None:
    assert campaign(target, QUICK) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_much_damaged_input_gives_a_result_or_a_typed_error(target: str) -> None:
    assert campaign(target, MANY, first=QUICK) == []
