"""Bins of equal shares: a frequent value is alone in its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.tokenizers.bins import quantile_bins


def bins_of(column: np.ndarray, bins: int, knots: int = 513) -> tuple[np.ndarray, np.ndarray]:
    return quantile_bins(np.quantile(column, np.linspace(0, 1, knots)), bins)


def codes(column: np.ndarray, borders: np.ndarray) -> np.ndarray:
    return np.searchsorted(borders, column, side="right")


@pytest.mark.parametrize("bins", [4, 16, 256])
def test_a_brake_that_is_mostly_zero_keeps_its_rare_values_apart(bins):
    column = np.array([0.0] * 97 + [0.4, 0.7, 1.0])
    borders, values = bins_of(column, bins)
    code = codes(column, borders)
    assert len(borders) == bins - 1 and len(values) == bins
    assert len(set(code[:97])) == 1 and values[code[0]] == 0
    assert not set(code[:97]) & set(code[97:]) and len(set(code[97:])) == (3 if bins > 4 else 2)
    assert codes(np.array([1e-6, -1e-6]), borders).tolist() == [code[0] + 1, code[0]]


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4, unique=True),
    st.lists(st.floats(-100, 100, width=32), max_size=30),
    st.integers(0, 3),
    st.integers(16, 256),
)
@settings(max_examples=200, deadline=None)
def test_a_frequent_value_comes_back_exactly_and_shares_its_bin_with_none(frequent, others, seed, bins):
    times = np.random.default_rng(seed).integers(200, 400, len(frequent))  # each far more than a bin's share
    column = np.concatenate([np.repeat(frequent, times), others])
    borders, values = bins_of(column, bins)
    assert (np.diff(borders[np.isfinite(borders)]) >= 0).all() and (np.diff(values) >= 0).all()
    code = codes(column, borders)
    shown = np.isin(column, frequent)
    assert (values[code[shown]] == column[shown]).all()
    assert not set(code[shown]) & set(code[~shown])
    assert len(set(code[shown])) == len(frequent)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 3.5, 7.0]), min_size=1, max_size=60), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_few_bins_are_well_formed_whatever_repeats(column, bins):
    borders, values = bins_of(np.array(column), bins)
    assert borders.shape == (bins - 1,) and values.shape == (bins,) and np.isfinite(values).all()
    assert (borders[1:] >= borders[:-1]).all() and (values[1:] >= values[:-1]).all()
    assert values.min() >= min(column) and values.max() <= max(column)


def test_bins_without_a_frequent_value_hold_equal_shares():
    column = np.random.default_rng(0).laplace(size=4096) ** 3
    count = np.bincount(codes(column, bins_of(column, 64)[0]), minlength=64)
    assert count.min() >= 55 and count.max() <= 73


def test_a_value_of_just_more_than_a_share_of_256_bins_is_seen():
    rng = np.random.default_rng(0)
    column = np.concatenate([rng.normal(size=100_000), np.full(450, 0.25)])  # 1/223 of the rows
    borders, values = bins_of(column, 256)
    assert values[codes(np.array([0.25]), borders)[0]] == 0.25
