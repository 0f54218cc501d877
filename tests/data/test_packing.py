"""Best-fit packing: nothing lost, nothing over capacity, never worse than first fit, and dense on real mixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.data.plan.packing import best_fit


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), max_size=80),
    st.integers(64, 200),
    st.integers(64, 200),
)
@settings(deadline=None)
def test_every_item_is_in_exactly_one_bin_and_no_bin_overflows(items, capacity, patch_capacity):
    lengths = np.array([a for a, _ in items], np.int64)
    patches = np.array([min(a, b) for a, b in items], np.int64)
    bins = best_fit(lengths, patches, capacity, patch_capacity)
    assert len(bins) == len(items) and set(bins.tolist()) == set(range(len(set(bins.tolist()))))
    for number in set(bins.tolist()):
        assert lengths[bins == number].sum() <= capacity
        assert patches[bins == number].sum() <= patch_capacity


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
@settings(deadline=None)
def test_the_chosen_bin_is_the_tightest_that_fits(lengths):
    """Replays the packing with a linear scan: the same number of bins and the same multiset of fills."""
    capacity = 50
    sizes = sorted(lengths, reverse=True)
    rooms: list[int] = []
    for size in sizes:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    array = np.array(lengths, np.int64)
    bins = best_fit(array, np.zeros_like(array), capacity, 0)
    assert sorted((capacity - np.bincount(bins, weights=array)).tolist()) == sorted(rooms)


def test_a_window_of_text_fills_sequences():
    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(400), 1.2, 2000), 2048).astype(np.int64)
    bins = best_fit(lengths, np.zeros_like(lengths), 2048, 0)
    assert lengths.sum() / ((bins.max() + 1) * 2048) > 0.98


def test_an_item_that_cannot_fit_is_named():
    with pytest.raises(ValueError, match="item 1 has 9 positions"):
        best_fit(np.array([4, 9]), np.array([0, 0]), 8, 8)
