"""Which rank gets which positions: each once, equally many, about equal work."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmoe.parallel.sequence import PIECES, Positions


def documents(lengths: list[int], length: int) -> np.ndarray:
    """[length]: numbers of documents of these lengths, cut at the end, padding behind them."""
    numbers = np.repeat(np.arange(len(lengths)), lengths)[:length]
    return np.pad(numbers, (0, length - len(numbers)), constant_values=-1)


def shard(rows: list[np.ndarray], cp: int, tp: int = 1) -> Positions:
    return Positions.for_rank(torch.from_numpy(np.stack(rows)), cp, tp, rank=0)


def keys_seen(document: np.ndarray) -> np.ndarray:
    """[length]: how many positions of its document, itself included, each position sees causally; padding sees none."""
    return np.array([np.sum(document[: i + 1] == number) if number >= 0 else 0 for i, number in enumerate(document)])


lengths = st.lists(st.integers(1, 70), min_size=1, max_size=30)


@given(st.lists(lengths, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_each_position_once_and_equally_many_on_every_rank(rows: list, cp: int, tp: int, units: int) -> None:
    length = cp * tp * PIECES * units
    sharding = shard([documents(row, length) for row in rows], cp=cp, tp=tp)
    assert sharding.attended_cBM.shape == (cp, len(rows), length // cp)
    assert sharding.streamed_nBH.shape == (cp * tp, len(rows), length // (cp * tp))
    for positions in (sharding.attended_cBM, sharding.streamed_nBH):
        assert (positions.diff(dim=2) > 0).all()
        everywhere = positions.transpose(0, 1).flatten(1).sort(1).values
        assert torch.equal(everywhere, torch.arange(length).expand(len(rows), -1))
    # The ranks of tp split what a rank of cp attends from, in order.
    assert torch.equal(sharding.streamed_nBH.unflatten(0, (cp, tp)).transpose(1, 2).flatten(2), sharding.attended_cBM)


@given(lengths, st.integers(2, 4), st.integers(1, 4))
def test_the_works_of_two_ranks_differ_by_no_more_than_the_costliest_piece(row: list[int], cp: int, units: int) -> None:
    length = cp * PIECES * units
    document = documents(row, length)
    seen, owned = keys_seen(document), shard([document], cp=cp).attended_cBM[:, 0].numpy()
    work = seen[owned].sum(1)
    assert work.max() - work.min() <= seen.reshape(cp * PIECES, -1).sum(1).max()


@given(lengths, st.integers(2, 4), st.integers(2, 3), st.integers(1, 2))
def test_parts_are_put_back_in_order(row: list[int], cp: int, tp: int, units: int) -> None:
    length = cp * tp * PIECES * units
    sharding = shard([documents(row, length), documents(row[::-1], length)], cp=cp, tp=tp)
    whole = torch.arange(2 * length).view(2, length, 1)
    parts = torch.stack([whole.take_along_dim(part[..., None], 1) for part in sharding.streamed_nBH])
    assert torch.equal(sharding.arrange(parts), whole)


def test_one_document_is_dealt_in_zig_zag() -> None:
    owned = shard([np.zeros(16, np.int64)], cp=2).attended_cBM[:, 0] // 2
    assert owned.tolist() == [[0, 0, 3, 3, 4, 4, 7, 7], [1, 1, 2, 2, 5, 5, 6, 6]]


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("median", [100, 1000])
def test_packed_sequences_are_balanced_better_than_by_halves_or_zig_zag(cp: int, median: int) -> None:
    """The slowest rank over the mean, of 60 sequences of log-normal documents."""
    length, rng, ratios = 2048, np.random.default_rng(0), []
    for _ in range(60):
        document = documents(rng.lognormal(np.log(median), 1.0, 200).astype(int).clip(2).tolist(), length - 50)
        document = np.pad(document, (0, 50), constant_values=-1)
        seen = keys_seen(document)
        halves = seen.reshape(cp, -1).sum(1)
        fine = seen.reshape(2 * cp, -1).sum(1)
        zig_zag = fine[:cp] + fine[::-1][:cp]
        dealt = seen[shard([document], cp=cp).attended_cBM[:, 0].numpy()].sum(1)
        ratios.append([work.max() / work.mean() for work in (dealt, zig_zag, halves)])
    dealt, zig_zag, halves = np.mean(ratios, axis=0)
    assert dealt < zig_zag and dealt < halves and dealt < 1.2
