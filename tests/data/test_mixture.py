"""Shares of positions by temperature and by weight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.data.mixture import explicit_shares, temperature_shares
from mmoe.errors import ConfigError

SIZES = st.dictionaries(st.text(min_size=1), st.integers(1, 10**13), min_size=1, max_size=8)


@given(SIZES, st.floats(0.5, 8))
def test_shares_sum_to_one_and_keep_the_order_of_sizes(sizes, temperature):
    shares = temperature_shares(sizes, temperature)
    assert sum(shares.values()) == pytest.approx(1)
    names = sorted(sizes, key=sizes.get)
    assert [shares[n] for n in names] == sorted(shares.values())


@given(SIZES)
def test_temperature_one_is_proportional_and_a_high_one_flattens(sizes):
    shares, flat = temperature_shares(sizes, 1.0), temperature_shares(sizes, 1e6)
    total = sum(sizes.values())
    assert all(shares[n] == pytest.approx(size / total) for n, size in sizes.items())
    assert all(share == pytest.approx(1 / len(sizes), rel=1e-3) for share in flat.values())


def test_the_formula_of_the_recipes():
    shares = temperature_shares({"web": 8_000, "code": 1_000}, 3.0)
    assert shares["web"] / shares["code"] == pytest.approx(2.0)


def test_weights_are_scaled_and_bad_ones_refused():
    assert explicit_shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    with pytest.raises(ConfigError, match="positive sum"):
        explicit_shares({"a": 0.0})
