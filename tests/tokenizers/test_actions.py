"""Actions: normalized, binned, chunked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmoe.errors import ConfigError, DataError
from mmoe.schema.vectors import VectorStats
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer

CONTINUOUS = ActionConfig()
tables = arrays(np.float64, st.tuples(st.integers(3, 40), st.just(2)), elements=st.floats(-50, 50, width=32))


def stats_of(rows: np.ndarray) -> VectorStats:
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    columns = {"mean": rows.mean(0), "std": rows.std(0), "q01": low, "q99": high}
    names = ("steering", "brake")
    quantiles = tuple(map(tuple, np.quantile(rows, np.linspace(0, 1, 257), axis=0).T.tolist()))
    columns = {name: tuple(value.tolist()) for name, value in columns.items()}
    return VectorStats(names=names, quantiles=quantiles, **columns)


def drive(rows: int = 2000) -> np.ndarray:
    """Steering about 0, and a brake that is 0 but for 5 rows in 1000."""
    random = np.random.default_rng(0)
    return np.stack([random.normal(0, 0.3, rows), (np.arange(rows) % 200 == 0) * 1.0], axis=1)


@given(tables)
def test_normalizing_is_invertible(rows):
    tokenizer = ActionTokenizer(CONTINUOUS, stats_of(rows))
    normalized = tokenizer.normalize(rows)
    assert normalized.dtype == np.float32 and np.isfinite(normalized).all()
    assert np.allclose(tokenizer.denormalize(normalized), rows, atol=1e-3)
    assert max(tokenizer.round_trip_error(rows).values()) < 1e-3


def test_quantiles_become_the_ends():
    rows = drive()
    stats = stats_of(rows)
    tokenizer = ActionTokenizer(CONTINUOUS, stats)
    assert np.allclose(tokenizer.normalize(np.array(stats.q01))[0], -1)
    assert np.allclose(tokenizer.normalize(np.array(stats.q99))[0], 1)


def test_rare_events_keep_a_sane_scale_and_constants_are_zero():
    rows = drive()
    assert stats_of(rows).q99[1] == stats_of(rows).q01[1]
    normalized = ActionTokenizer(CONTINUOUS, stats_of(rows)).normalize(rows)
    assert 1 < np.abs(normalized[:, 1]).max() < 20  # neither infinite nor lost
    rows[:, 1] = 0.7
    tokenizer = ActionTokenizer(CONTINUOUS, stats_of(rows))
    assert (tokenizer.normalize(rows)[:, 1] == 0).all()
    assert np.allclose(tokenizer.denormalize(np.zeros((3, 2)))[:, 1], 0.7)


@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 12))
def test_chunks_stop_at_the_end_of_the_episode(chunk, start, stop):
    rows = np.arange(1, 25, dtype=np.float64).reshape(12, 2)
    tokenizer = ActionTokenizer(ActionConfig(chunk=chunk), stats_of(rows))
    if start > stop:
        with pytest.raises(ValueError, match="a chunk from row"):
            tokenizer.chunk_of(rows, start, stop)
        return
    target, mask = tokenizer.chunk_of(rows, start, stop)
    assert target.shape == mask.shape == (chunk, 2)
    steps = min(chunk, stop - start)
    assert mask.tolist() == [[step < steps] * 2 for step in range(chunk)]
    assert (target[:steps] == rows[start : start + steps]).all() and (target[steps:] == 0).all()


def test_a_chunk_with_nan_is_refused_by_name_but_not_what_lies_behind_the_episode():
    rows = drive(10)
    tokenizer = ActionTokenizer(CONTINUOUS, stats_of(rows))
    rows[5, 1] = np.nan
    tokenizer.chunk_of(rows, 3, 5)
    with pytest.raises(DataError, match="^brake holds NaN"):
        tokenizer.chunk_of(rows, 3, 6)


@given(tables, st.integers(2, 300))
@settings(max_examples=50)
def test_uniform_bins_err_by_half_a_bin_at_most(rows, bins):
    tokenizer = ActionTokenizer(ActionConfig(mode="discrete", bins=bins), stats_of(rows))
    codes = tokenizer.encode(rows)
    assert codes.dtype == np.int64 and ((codes >= 0) & (codes < bins)).all()
    normalized, back = tokenizer.normalize(rows), tokenizer.normalize(tokenizer.decode(codes))
    assert (np.abs(np.clip(normalized, -1, 1) - back) <= 1 / bins + 1e-3).all()


@given(tables, st.integers(2, 64), st.sampled_from(["uniform", "quantile"]))
@settings(max_examples=50)
def test_bins_keep_order_and_are_stable(rows, bins, binning):
    tokenizer = ActionTokenizer(ActionConfig(mode="discrete", bins=bins, binning=binning), stats_of(rows))
    codes = tokenizer.encode(rows)
    for a in range(2):
        order = np.argsort(rows[:, a])
        assert (np.diff(codes[order, a]) >= 0).all()
        assert (np.diff(tokenizer.decode(codes[order])[:, a]) >= -1e-4).all()


def test_quantile_bins_are_evenly_filled_and_beat_uniform_ones_on_skewed_rows():
    rows = np.random.default_rng(0).laplace(size=(4000, 2)) ** 3
    uniform, quantile = (
        ActionTokenizer(ActionConfig(mode="discrete", bins=32, binning=kind), stats_of(rows))
        for kind in ("uniform", "quantile")
    )
    filled = np.bincount(quantile.encode(rows)[:, 0], minlength=32)
    assert filled.min() >= 115 and filled.max() <= 135
    inner = rows[(np.abs(rows) < np.median(np.abs(rows))).all(1)]
    assert quantile.round_trip_error(inner)["steering"] < 0.2 * uniform.round_trip_error(inner)["steering"]


def test_more_bins_err_less():
    rows = drive()
    errors = [
        ActionTokenizer(ActionConfig(mode="discrete", bins=bins), stats_of(rows)).round_trip_error(rows)["steering"]
        for bins in (4, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_quantile_bins_stand_for_what_is_often_exactly_so():
    """A brake that is 0 for 99.5 % of the rows is read back as 0."""
    tokenizer = ActionTokenizer(ActionConfig(mode="discrete", bins=64, binning="quantile"), stats_of(drive()))
    still = np.zeros((3, 2))
    assert (np.abs(tokenizer.decode(tokenizer.encode(still))[:, 1]) < 0.01).all()


def test_quantile_bins_need_quantiles():
    stats = stats_of(drive()).model_copy(update={"quantiles": ()})
    with pytest.raises(ConfigError, match="tokenizers.action.binning quantile needs the quantiles.*prepare the source"):
        ActionTokenizer(ActionConfig(mode="discrete", binning="quantile"), stats)


def test_tokens_of_a_chunk():
    stats = stats_of(drive())
    assert ActionTokenizer(ActionConfig(chunk=3), stats).tokens == 1
    assert ActionTokenizer(ActionConfig(mode="discrete", chunk=3), stats).tokens == 6


def test_a_glitch_is_clipped_and_a_flipped_exponent_is_refused_by_name():
    rows = drive()
    fences = {"low": (-9.0, -10.0), "high": (9.0, 11.0), "minimum": (-2.0, 0.0), "maximum": (65535.0, 1.0)}
    tokenizer = ActionTokenizer(CONTINUOUS, stats_of(rows).model_copy(update=fences))
    rows[5, 0] = 65535
    target, _ = tokenizer.chunk_of(rows, 5, 9)
    assert (tokenizer.normalize(target)[0] == tokenizer.normalize(np.array([9.0, rows[5, 1]]))).all()
    assert tokenizer.round_trip_error(rows)["steering"] < 1e-6
    rows[6, 1] = np.float32(1e30)
    with pytest.raises(DataError, match=r"^brake is 1e\+30, but preparation saw 0 to 1 in this source"):
        tokenizer.chunk_of(rows, 5, 9)


def test_a_frequent_value_has_a_quantile_bin_of_its_own():
    rows = np.array([0.0] * 97 + [0.4, 0.7, 1.0])[:, None].repeat(2, axis=1)
    tokenizer = ActionTokenizer(ActionConfig(mode="discrete", bins=16, binning="quantile"), stats_of(rows))
    codes = tokenizer.encode(rows)
    assert len({*codes[97:, 0], codes[0, 0]}) == 4
    assert (tokenizer.decode(codes[:97]) == 0).all() and (tokenizer.decode(codes[97:]) > 0.3).all()
