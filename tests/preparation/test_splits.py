"""Held-out recordings: whole ones, or tails behind a gap; the same for every order of the items."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.errors import DataError
from mmoe.preparation.sources.base import Item
from mmoe.preparation.splits import Holdout, Split, split_recordings


def item(key, recording, start=0, stop=0, rank=0):
    return Item(key, recording, make=None, start=start, stop=stop, rank=rank)


def pieces(name, lengths):
    """Adjacent items of the given lengths that fill a recording."""
    at, made = 0, []
    for number, length in enumerate(lengths):
        made.append(item(f"{name}-{number}", name, at, at + length))
        at += length
    return made


def keys(items):
    return {i.key for i in items}


@given(st.lists(st.integers(1, 4), min_size=2, max_size=40), st.floats(0.01, 0.9), st.randoms(use_true_random=False))
def test_recordings_are_held_out_whole_whatever_the_order(sizes, share, shuffler):
    items = [item(f"{r}-{i}", f"drive {r}") for r, size in enumerate(sizes) for i in range(size)]
    sides = split_recordings(items, share, gap=5)
    assert keys(sides.train) | keys(sides.heldout) == keys(items) and not sides.gap
    held, kept = {i.recording for i in sides.heldout}, {i.recording for i in sides.train}
    assert held and kept and not held & kept
    assert abs(len(held) - share * len(sizes)) <= 1
    shuffled = list(items)
    shuffler.shuffle(shuffled)
    assert keys(split_recordings(shuffled, share, gap=5).heldout) == keys(sides.heldout)
    assert sides.heldout == [i for i in items if i.recording in held]  # in the order of the items


def test_a_new_recording_moves_few_of_the_others():
    """A keyed hash orders the recordings, so growing a data set does not turn the split over."""
    before = split_recordings([item(str(r), str(r)) for r in range(100)], 0.2, 0)
    after = split_recordings([item(str(r), str(r)) for r in range(110)], 0.2, 0)
    moved = keys(before.heldout) & keys(after.train)
    assert len(moved) <= 5


def test_the_last_takes_are_held_out_first():
    items = [item(f"{take}-{i}", f"take-{take}", rank=take) for take in (5, 6, 7, 8, 9, 10, 11) for i in range(3)]
    random.Random(0).shuffle(items)
    assert {i.recording for i in split_recordings(items, 0.15, 0).heldout} == {"take-11"}
    assert {i.recording for i in split_recordings(items, 0.3, 0).heldout} == {"take-11", "take-10"}


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=60), min_size=1, max_size=3), st.integers(0, 60))
def test_few_recordings_give_their_tails_behind_a_gap(recordings, gap):
    items = [i for number, lengths in enumerate(recordings) for i in pieces(f"tub{number}", lengths)]
    sides = split_recordings(items, 0.15, gap)
    assert sorted(keys(sides.train) | keys(sides.heldout) | keys(sides.gap)) == sorted(keys(items))
    assert len(sides.train) + len(sides.heldout) + len(sides.gap) == len(items)
    if len(recordings) > 1 and all(lengths[-1] > round(0.15 * sum(lengths)) for lengths in recordings):
        assert len({i.recording for i in sides.heldout}) == 1 and sides.train and not sides.gap  # none has a tail
        return
    for number, lengths in enumerate(recordings):
        mine = [i for i in sides.heldout if i.recording == f"tub{number}"]
        train = [i for i in sides.train if i.recording == f"tub{number}"]
        held = sum(i.stop - i.start for i in mine)
        assert 0.15 * sum(lengths) - max(lengths) <= held <= 0.15 * sum(lengths) + 1
        if mine:
            first = min(i.start for i in mine)
            assert all(i.stop <= first - gap for i in train)
            assert all(i.stop > first - gap for i in sides.gap if i.recording == f"tub{number}")


def test_one_recording_that_cannot_be_cut_is_an_error_unless_nothing_is_held_out():
    items = [item("a", "only"), item("b", "only")]
    with pytest.raises(DataError, match="the only recording is 'only' .* prepare.heldout_share=0"):
        split_recordings(items, 0.15, 0)
    assert split_recordings(items, 0.0, 0).train == items


def test_recordings_of_one_item_each_are_held_out_whole_where_none_has_a_tail():
    """Five small files of one text each: none has a last 15 %."""
    items = [Item(f"k{n}", f"r{n}", str, start=0, stop=30) for n in range(5)]
    sides = split_recordings(items, 0.15, gap=0)
    assert len(sides.heldout) == 1 and len(sides.train) == 4 and not sides.gap


@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=40),
    st.floats(0.02, 0.9),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_by_size_no_more_than_the_share_of_what_there_is_is_held_out_and_nothing_that_would_fit_stays(
    sizes, share, cut, shuffler
):
    items = [
        piece
        for r, size in enumerate(sizes)
        for piece in pieces(f"book {r}", [size - size // 2, size // 2][: 1 + size // 2])
    ]
    if not cut:  # the extent says how large they are, and one of them may not be cut
        items.append(item("whole", "book 0"))
    sides = split_recordings(items, share, 0, "size")
    shuffled = list(items)
    shuffler.shuffle(shuffled)
    assert keys(split_recordings(shuffled, share, 0, "size").heldout) == keys(sides.heldout)
    assert keys(sides.train) | keys(sides.heldout) | keys(sides.gap) == keys(items)
    held, kept = ({i.recording for i in side} for side in (sides.heldout, sides.train))
    if held & kept:
        assert cut  # tails: no choice of wholes comes near
        return
    size = {name: sum(max(1, i.stop - i.start) for i in items if i.recording == name) for name in held | kept}
    total, out = sum(size.values()), sum(size[name] for name in held)
    if out > share * total * (1 + 1e-9):
        assert len(held) == 1 and out == min(size.values())  # one at least
    elif len(kept) > 1:
        assert all(out + size[name] > share * total * (1 - 1e-9) for name in kept)


def test_by_size_one_large_recording_beside_small_ones_gives_its_tail_where_it_may_be_cut():
    """A million bytes beside thirty: by recordings five small ones are held out, by size a tenth of the bytes."""
    large, small = pieces("large", [1000] * 1000), [i for n in range(30) for i in pieces(f"small{n}", [1])]
    share = lambda side: sum(i.stop - i.start for i in side) / 1_000_030  # noqa: E731
    assert share(split_recordings(large + small, 0.1, 0).heldout) < 1e-5
    assert share(split_recordings(large + small, 0.1, 0, "size").heldout) == pytest.approx(0.1, rel=1e-2)


def test_everything_may_be_held_out_and_a_list_says_what_by_key_or_recording():
    items = [item(f"{r}-{i}", f"drive {r}") for r in range(4) for i in range(3)]
    assert Holdout(1.0).split(items, 5) == split_recordings(items, 1.0, 5) == Split([], items, [])
    sides = Holdout(0.5, listed=frozenset({"drive 2", "0-1", "nothing"})).split(items, 5)
    assert keys(sides.heldout) == {"2-0", "2-1", "2-2", "0-1"} and not sides.gap
    assert [i.key for i in sides.train] == [i.key for i in items if i.key not in keys(sides.heldout)]
