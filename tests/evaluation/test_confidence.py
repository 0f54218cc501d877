"""Bounds against published values and against a simulation."""

import numpy as np
import pytest

from mmoe.evaluation.confidence import mean_low, wilson_low


@pytest.mark.parametrize(
    ("hits", "trials", "low"),
    [(50, 100, 0.40383), (1, 10, 0.01788), (81, 263, 0.25528), (0, 10, 0.0), (10, 10, 0.72247)],
)
def test_wilson_agrees_with_known_intervals(hits, trials, low):
    assert wilson_low(hits / trials, trials) == pytest.approx(low, abs=1e-4)


def test_wilson_covers_the_truth_as_often_as_it_says():
    hits = np.random.default_rng(0).binomial(60, 0.3, 4000)
    assert np.mean([wilson_low(h / 60, 60) <= 0.3 for h in hits]) == pytest.approx(0.975, abs=0.02)


def test_the_bound_of_a_mean_covers_it_as_often_as_it_says():
    values = np.random.default_rng(0).normal(1.0, 2.0, (4000, 10))
    assert np.mean([mean_low(row) <= 1.0 for row in values]) == pytest.approx(0.975, abs=0.01)
