"""Statistics of vectors: exact for ordinary rows, robust against glitches, whoever counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.preparation.statistics import VectorSummary
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from mmoe.tokenizers.vectors import VectorNormalizer


def summary(rows: np.ndarray, seed: int = 0, capacity: int = 1 << 16) -> VectorSummary:
    made = VectorSummary(rows.shape[1], capacity)
    made.add(rows.astype(np.float32), seed)
    return made


def stats_of(rows: np.ndarray, heldout: np.ndarray | None = None):
    names = tuple(f"d{number}" for number in range(rows.shape[1]))
    return summary(rows).stats(names, 0, 513, None if heldout is None else summary(heldout))


def scales(stats) -> tuple[np.ndarray, np.ndarray]:
    """Half of what an action's -1 to 1 spans, and a reading's standard deviation."""
    dims = len(stats.names)
    action, vector = ActionTokenizer(ActionConfig(), stats), VectorNormalizer(stats)
    half = action.denormalize(np.ones(dims)) - action.denormalize(np.zeros(dims))
    return half, vector.inverse(np.ones(dims)) - vector.inverse(np.zeros(dims))


def test_one_glitch_in_20000_rows_changes_no_scale_and_is_counted():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(0, 0.3, 20_000), (np.arange(20_000) % 200 == 0) * 1.0, np.full(20_000, 9.81)], axis=1)
    clean = stats_of(rows)
    rows[777], rows[5000, 2] = 65535, -65535
    rows[778] = 0.1, 0.0, 9.81
    glitched = stats_of(rows)
    assert glitched.clipped == {"train": (1, 1, 2)} and clean.clipped == {"train": (0, 0, 0)}
    assert glitched.maximum == (65535, 65535, 65535) and glitched.minimum[2] == -65535
    for found, expected in zip(scales(glitched), scales(clean)):
        np.testing.assert_allclose(found, expected, rtol=0.01)
    action, vector = ActionTokenizer(ActionConfig(), glitched), VectorNormalizer(glitched)
    for normalized in (action.normalize(rows), vector(rows)):
        assert (np.abs(normalized).max(0) < [100, 200, 1e-9]).all()
    assert max(map(max, glitched.quantiles)) < 65


@given(st.integers(0, 3), st.integers(1, 4), st.floats(1000, 1e30), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_few_outliers_leave_the_scale(kind, outliers, size, both, seed):
    rng = np.random.default_rng(seed)
    draw = [rng.normal, rng.laplace, rng.uniform, rng.exponential][kind]
    rows = draw(size=(4000, 1))
    clean = stats_of(rows)
    at = rng.choice(4000, outliers, replace=False)
    rows[at, 0] = size * (rng.choice([-1, 1], outliers) if both else 1)
    stats = stats_of(rows)
    assert stats.clipped["train"] == (outliers,)
    for found, expected in zip(scales(stats), scales(clean)):
        assert (np.abs(found / expected - 1) < 0.15).all()


def test_ordinary_heavy_tails_keep_the_exact_moments():
    rng = np.random.default_rng(0)
    columns = [rng.laplace(size=100_000) ** 2, rng.lognormal(size=100_000), rng.standard_t(3, size=100_000)]
    columns.append((rng.random(100_000) < 0.002) * rng.random(100_000))  # a pedal that is hardly ever pressed
    columns.append((np.arange(100_000) < 30) * 1.0)  # a button pressed for 30 rows
    rows = np.stack(columns, axis=1)
    made = summary(rows)
    stats = made.stats(("a", "b", "c", "d", "e"), 0)
    assert stats.clipped["train"] == (0,) * 5
    assert stats.mean == tuple(made.mean.tolist()) and stats.std == tuple(np.sqrt(made.m2 / made.count).tolist())


def test_what_is_clipped_of_the_heldout_rows_is_counted_too():
    rng = np.random.default_rng(0)
    train, heldout = rng.normal(size=(3000, 1)), rng.normal(size=(500, 1))
    heldout[:3, 0] = 1e6, -1e6, 2e6
    stats = stats_of(train, heldout)
    assert stats.clipped == {"train": (0,), "heldout": (3,)}
    assert stats.maximum == (2e6,) and stats.minimum == (-1e6,)
    assert scales(stats) == scales(stats_of(train))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
    st.integers(0, 5),
    st.integers(0, 300),
)
@settings(max_examples=100, deadline=None)
def test_clipped_rows_have_the_same_statistics(values, glitches, constant):
    rows = np.array([values[:1] * constant + values + [1e38] * glitches]).T.astype(np.float32)
    once = stats_of(rows)
    again = stats_of(np.clip(rows.astype(np.float64), once.low, once.high))
    for field in ("mean", "std", "q01", "q99", "quantiles", "low", "high"):
        np.testing.assert_allclose(getattr(again, field), getattr(once, field), rtol=1e-9, err_msg=field)
    assert again.clipped == {"train": (0,)}


@pytest.mark.parametrize("capacity", [1 << 16, 500])
def test_the_order_of_merging_changes_nothing(capacity):
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(200, 2)) for _ in range(8)]
    tables[3][5, 0] = 65535
    parts = [summary(table, 1000 * seed, capacity) for seed, table in enumerate(tables)]
    found = []
    for order in (range(8), reversed(range(8)), rng.permutation(8)):
        whole = VectorSummary(2, capacity)
        for number in order:
            whole.merge(parts[number])
        found.append(whole.stats(("a", "b"), 0, 17))
    first = found[0]
    assert first.clipped["train"][0] >= 1 and first.clipped["train"][1] == 0
    for other in found[1:]:
        # The dimension without a glitch has exact moments, joined in another order.
        np.testing.assert_allclose(other.mean + other.std, first.mean + first.std, rtol=1e-12, atol=1e-15)
        same = ("q01", "q99", "quantiles", "low", "high", "minimum", "maximum", "clipped")
        assert all(getattr(other, field) == getattr(first, field) for field in same)
        assert other.mean[0] == first.mean[0] and other.std[0] == first.std[0]


def test_above_the_reservoir_what_is_clipped_is_estimated_but_never_missed():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50_000, 2))
    rows[:25, 0], rows[7, 1] = 1e9, 1e9
    made = summary(rows, capacity=2000)
    stats = made.stats(("a", "b"), 0)
    assert made.estimated and 1 <= stats.clipped["train"][0] <= 100 and 1 <= stats.clipped["train"][1] <= 100
    np.testing.assert_allclose(stats.std, 1, rtol=0.1)


def test_a_stored_summary_is_the_same():
    made = summary(np.random.default_rng(0).normal(size=(300, 2)))
    again = VectorSummary.from_arrays(made.arrays())
    assert again.stats(("a", "b"), 0, 17) == made.stats(("a", "b"), 0, 17)
