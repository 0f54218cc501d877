"""Normalized vectors: unit scale, invertible, constants and NaN."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmoe.errors import DataError
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.vectors import VectorNormalizer

rows = arrays(np.float64, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-1e4, 1e4, width=32))


def stats_of(rows: np.ndarray) -> VectorStats:
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    columns = {"mean": rows.mean(0), "std": rows.std(0), "q01": low, "q99": high}
    names = tuple(f"d{i}" for i in range(rows.shape[1]))
    return VectorStats(names=names, **{name: tuple(value.tolist()) for name, value in columns.items()})


@given(rows)
def test_inverse_and_scale(rows):
    normalizer = VectorNormalizer(stats_of(rows))
    normalized = normalizer(rows)
    assert normalized.dtype == np.float32 and np.isfinite(normalized).all()
    assert np.allclose(normalizer.inverse(normalized), rows, rtol=1e-5, atol=1e-3)
    varied = np.ptp(rows, axis=0) > 1
    assert np.allclose(normalized.mean(0)[varied], 0, atol=1e-3)
    assert np.allclose(normalized.std(0)[varied], 1, atol=1e-3)


def test_constant_dimensions_become_zero_and_come_back():
    rows = np.random.default_rng(0).normal(size=(50, 3))
    rows[:, 1] = np.float32(9.81)
    normalizer = VectorNormalizer(stats_of(rows))
    assert (normalizer(rows + np.array([0, 5, 0]))[:, 1] == 0).all()  # even where a later recording differs
    assert np.allclose(normalizer.inverse(normalizer(rows))[:, 1], 9.81)


def test_small_and_offset_dimensions_are_not_taken_for_constant():
    rows = np.random.default_rng(0).normal(size=(50, 3)) * [1e-5, 2.0, 1.0] + [0.0, 4e6, 0.0]
    assert np.allclose(VectorNormalizer(stats_of(rows))(rows).std(0), 1, atol=0.05)


def test_one_row_and_many_agree():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    normalizer = VectorNormalizer(stats_of(rows))
    assert (normalizer(rows)[2] == normalizer(rows[2])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_by_name(value):
    rows = np.random.default_rng(0).normal(size=(4, 3))
    normalizer = VectorNormalizer(stats_of(rows))
    rows[2, 1] = value
    for bad in (rows, rows[2]):
        with pytest.raises(DataError, match="^d1 holds NaN or infinity"):
            normalizer(bad)
    with pytest.raises(DataError, match="2 values stands where 3 are known"):
        normalizer(np.zeros((4, 2)))


def test_glitches_are_clipped_and_what_preparation_did_not_see_is_refused_by_name():
    rows = np.random.default_rng(0).normal(size=(50, 3))
    fences = {
        "low": (-5.0, -6.0, -7.0),
        "high": (5.0, 6.0, 7.0),
        "minimum": (-5.0,) * 3,
        "maximum": (5.0, 65535.0, 5.0),
    }
    normalizer = VectorNormalizer(stats_of(rows).model_copy(update=fences))
    assert (normalizer(np.array([0, 65535.0, 0])) == normalizer(np.array([0, 6.0, 0]))).all()
    for bad in (1e30, 1e300, -65536.0):
        rows[3, 1] = bad
        with pytest.raises(DataError, match=r"^d1 is -?[\d.e+]+, but preparation saw -5 to 65535 in this source"):
            normalizer(rows)


@given(rows)
def test_clipping_twice_is_clipping_once(rows):
    fences = {"low": (-5.0, -0.5, -1e9), "high": (5.0, 0.5, 1e9)}
    clip = VectorNormalizer(stats_of(rows).model_copy(update=fences)).fences.clip
    assert (clip(clip(rows)) == clip(rows)).all() and (clip(rows)[:, 2] == rows[:, 2]).all()


def test_a_manifest_with_a_repeated_name_or_a_missing_value_is_refused():
    stats = stats_of(np.random.default_rng(0).normal(size=(50, 3))).model_dump()
    with pytest.raises(ValueError, match="the dimension name d0 occurs twice among d0, d1, d0"):
        VectorStats(**stats | {"names": ("d0", "d1", "d0")})
    with pytest.raises(ValueError, match="std has 2 values for 3 dimensions"):
        VectorStats(**stats | {"std": (1.0, 1.0)})
