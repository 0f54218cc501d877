"""Normalised vectors: unit scale, invertible, constants and NaN."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmoe.data.index import VectorStats
from mmoe.errors import DataError
from mmoe.tokenizers.vectors import VectorNormaliser

rows = arrays(np.float64, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-1e4, 1e4, width=32))


def stats_of(rows: np.ndarray) -> VectorStats:
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    columns = {"mean": rows.mean(0), "std": rows.std(0), "q01": low, "q99": high}
    names = tuple(f"d{i}" for i in range(rows.shape[1]))
    return VectorStats(names=names, **{name: tuple(value.tolist()) for name, value in columns.items()})


@given(rows)
def test_inverse_and_scale(rows):
    normaliser = VectorNormaliser(stats_of(rows))
    normalised = normaliser(rows)
    assert normalised.dtype == np.float32 and np.isfinite(normalised).all()
    assert np.allclose(normaliser.inverse(normalised), rows, rtol=1e-5, atol=1e-3)
    varied = np.ptp(rows, axis=0) > 1
    assert np.allclose(normalised.mean(0)[varied], 0, atol=1e-3)
    assert np.allclose(normalised.std(0)[varied], 1, atol=1e-3)


def test_constant_dimensions_become_zero_and_come_back():
    rows = np.random.default_rng(0).normal(size=(50, 3))
    rows[:, 1] = np.float32(9.81)
    normaliser = VectorNormaliser(stats_of(rows))
    assert (normaliser(rows + [0, 5, 0])[:, 1] == 0).all()  # even where a later recording differs
    assert np.allclose(normaliser.inverse(normaliser(rows))[:, 1], 9.81)


def test_small_and_offset_dimensions_are_not_taken_for_constant():
    rows = np.random.default_rng(0).normal(size=(50, 3)) * [1e-5, 2.0, 1.0] + [0.0, 4e6, 0.0]
    assert np.allclose(VectorNormaliser(stats_of(rows))(rows).std(0), 1, atol=0.05)


def test_one_row_and_many_agree():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    normaliser = VectorNormaliser(stats_of(rows))
    assert (normaliser(rows)[2] == normaliser(rows[2])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_by_name(value):
    rows = np.random.default_rng(0).normal(size=(4, 3))
    normaliser = VectorNormaliser(stats_of(rows))
    rows[2, 1] = value
    for bad in (rows, rows[2]):
        with pytest.raises(DataError, match="^d1 holds NaN or infinity"):
            normaliser(bad)
    with pytest.raises(DataError, match="2 values stands where 3 are known"):
        normaliser(np.zeros((4, 2)))
