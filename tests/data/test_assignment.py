"""Dealing: every sequence once, contrastive groups within their reach, and work that is even."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.data.plan.assignment import ContrastiveScope, assign_to_replicas, balance, check_dealing
from mmoe.errors import ConfigError


@st.composite
def shapes(draw) -> tuple[int, int, int, int]:
    """Sequences of a micro-batch, replicas, micro-steps, and a group of sequences that divides their product."""
    micro, replicas, steps = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    sequences = micro * replicas * steps
    return micro, replicas, steps, draw(st.sampled_from([n for n in range(1, sequences + 1) if sequences % n == 0]))


def mixed(rng: np.random.Generator, sequences: int) -> np.ndarray:
    """[S, 2] attention work and patches; some sequences are of text alone."""
    patches = np.where(rng.random(sequences) < rng.random(), rng.integers(1, 100, sequences), 0)
    return np.stack([rng.integers(0, 1000, sequences), patches], axis=1)


@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_every_sequence_is_dealt_once_and_groups_stay_within_their_reach(shape, seed):
    micro, replicas, accumulation, group = shape
    sequences = micro * replicas * accumulation
    costs = mixed(np.random.default_rng(seed), sequences)
    dealt = assign_to_replicas(costs, group, micro, replicas)
    assert dealt.shape == (replicas, micro * accumulation)
    assert sorted(dealt.flatten().tolist()) == list(range(sequences))
    steps = (dealt // group).reshape(replicas, accumulation, micro)  # the group of each sequence
    scope = ContrastiveScope.narrowest(group, micro, replicas)
    if scope is ContrastiveScope.MICRO_BATCH:
        wholes = dealt.reshape(-1, group)
        assert (wholes[:, 0] % group == 0).all() and (np.diff(wholes, axis=1) == 1).all()
    if scope is not ContrastiveScope.STEP:
        found = [set(steps[:, k].flatten().tolist()) for k in range(accumulation)]
        assert sum(map(len, found)) == sequences // group


@pytest.mark.parametrize(
    ("group", "micro", "replicas", "scope"),
    [
        (1, 1, 1, ContrastiveScope.MICRO_BATCH),
        (2, 4, 1, ContrastiveScope.MICRO_BATCH),
        (4, 2, 2, ContrastiveScope.MICRO_STEP),
        (3, 4, 3, ContrastiveScope.MICRO_STEP),  # groups across the borders of micro-batches
        (8, 2, 2, ContrastiveScope.STEP),
        (4, 2, 1, ContrastiveScope.STEP),
        (4, 2, 3, ContrastiveScope.STEP),  # 1.5 groups to a micro-step
    ],
)
def test_the_reach_is_the_narrowest_that_whole_groups_fill(group, micro, replicas, scope):
    assert ContrastiveScope.narrowest(group, micro, replicas) is scope


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_replicas_differ_by_no_more_than_the_sequences_of_one_round_do(data, seed):
    """Of one kind of work, where groups are gathered: of a micro-step's sequences by cost, R at a time, the most uneven
    round."""
    micro, replicas, accumulation = (data.draw(st.integers(*ends)) for ends in ((1, 4), (2, 8), (1, 4)))
    groups = [group for group in range(1, micro * replicas + 1) if micro * replicas % group == 0]
    gathered = [g for g in groups if ContrastiveScope.narrowest(g, micro, replicas) is ContrastiveScope.MICRO_STEP]
    group = data.draw(st.sampled_from(gathered))
    costs = np.random.default_rng(seed).integers(0, 1000, micro * replicas * accumulation)
    work = costs[assign_to_replicas(costs[:, None], group, micro, replicas)].reshape(replicas, accumulation, micro)
    for k in range(accumulation):
        sums, rounds = work[:, k].sum(1), np.sort(work[:, k], axis=None).reshape(micro, replicas)
        assert sums.max() - sums.min() <= np.ptp(rounds, axis=1).max()


def by_attention(costs: np.ndarray, group: int, micro: int, replicas: int) -> np.ndarray:
    """Dealing by one cost, written by ranks: of a round the i-th costliest goes to the i-th least loaded."""

    def falling(units):
        return units[np.argsort(-costs[units].sum(axis=1), kind="stable")]

    scope, spans = ContrastiveScope.narrowest(group, micro, replicas), np.arange(len(costs))
    spans = spans.reshape(1, -1, group if scope is ContrastiveScope.MICRO_BATCH else 1)
    if scope is ContrastiveScope.MICRO_STEP:
        spans = falling(spans.reshape(-1, group)).reshape(-1, micro * replicas, 1)
    total, rounds = np.zeros(replicas, np.int64), []
    for units in spans:
        work = np.zeros(replicas, np.int64)
        for taken in falling(units).reshape(-1, replicas, spans.shape[2]):
            dealt = np.empty_like(taken)
            dealt[np.lexsort((total, work))] = taken
            rounds.append(dealt)
            work += costs[dealt].sum(axis=1)
            total += costs[dealt].sum(axis=1)
    return np.concatenate(rounds, axis=1)


@given(shape=shapes(), seed=st.integers(0, 2**32), large=st.booleans())
def test_without_patches_or_replicas_attention_alone_decides(shape, seed, large):
    """Large: as of sequences of 16 million positions, which no rounding may take for equal."""
    micro, replicas, accumulation, group = shape
    rng = np.random.default_rng(seed)
    costs = mixed(rng, micro * replicas * accumulation)
    if large:
        costs[:, 0] = 2**48 - rng.integers(0, 4, len(costs))
    if replicas > 1:
        costs[:, 1] = 0
    assert np.array_equal(
        assign_to_replicas(costs, group, micro, replicas), by_attention(costs[:, 0], group, micro, replicas)
    )


@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_the_balance_is_that_of_the_replica_that_has_most(shape, seed):
    micro, replicas, accumulation, group = shape
    costs = mixed(np.random.default_rng(seed), micro * replicas * accumulation)
    dealt = assign_to_replicas(costs, group, micro, replicas)
    for kind, found in zip(costs.T, balance(costs, dealt), strict=True):
        sums = [int(kind[mine].sum()) for mine in dealt]
        assert found == pytest.approx(max(sums) * replicas / sum(sums) if any(sums) else 1.0)
        assert 1 - 1e-12 <= found <= replicas + 1e-12


@pytest.mark.parametrize("group", [1, 8, 64])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_both_kinds_of_work_are_evener_than_dealt_in_turn_in_sum_and_at_the_same_time(group, share):
    """16 replicas of 4 micro-steps of 2 sequences, a share of them with images; patches also than by attention."""
    rng, replicas, micro, steps = np.random.default_rng(0), 16, 2, 4
    found = {"both": [], "turn": [], "attention": []}
    for _ in range(20):
        sequences = replicas * micro * steps
        patches = np.where(rng.random(sequences) < share, rng.lognormal(5, 0.5, sequences), 0)
        costs = np.stack([rng.lognormal(10, 0.7, sequences), patches], axis=1).astype(np.int64)
        ways = {
            "both": assign_to_replicas(costs, group, micro, replicas),
            "turn": np.arange(sequences).reshape(-1, replicas).T,
            "attention": by_attention(costs[:, 0], group, micro, replicas),
        }
        for way, dealt in ways.items():
            work = costs[dealt].reshape(replicas, steps, micro, 2).sum(axis=2)
            waits = work.max(axis=0).sum(axis=0) / work.mean(axis=0).sum(axis=0)  # each micro-step for its slowest
            found[way].append(np.concatenate([balance(costs, dealt), waits]))
    both, turn, attention = (np.mean(found[way], axis=0) for way in found)
    assert (both < turn).all()
    assert (both[[1, 3]] < attention[[1, 3]]).all()


@pytest.mark.parametrize("group", [1, 16, 64, 512], ids=lambda group: f"group{group}")
def test_dealing_evens_out_the_work(group):
    """64 replicas of 8 sequences in micro-batches of 1: groups of 16 and 64 are gathered, one of 512 is cached."""
    rng, dealt, as_they_come = np.random.default_rng(0), [], []
    for _ in range(20):
        costs = rng.lognormal(0, 0.5, 64 * 8)
        for ratios, work in (
            (dealt, costs[assign_to_replicas(costs[:, None], group, 1, 64)]),
            (as_they_come, costs.reshape(64, 8)),
        ):
            ratios.append(work.sum(1).max() / work.sum(1).mean() - 1)
    assert np.mean(dealt) < 0.5 * np.mean(as_they_come)


def test_one_replica_works_off_its_groups_the_costliest_first():
    costs = np.array([[1, 90], [1, 0], [9, 0], [0, 70], [3, 0], [3, 0], [5, 0], [0, 0]])  # whatever its patches
    assert assign_to_replicas(costs, 2, 2, 1).tolist() == [[2, 3, 4, 5, 6, 7, 0, 1]]
    assert assign_to_replicas(costs, 8, 2, 1).tolist() == [[2, 6, 4, 5, 0, 1, 3, 7]]


@pytest.mark.parametrize(
    ("group", "micro", "replicas"), [(1, 1, 3), (1, 3, 1), (3, 1, 1), (16, 1, 1)], ids=lambda value: str(value)
)
def test_what_does_not_divide_is_refused_with_the_keys(group, micro, replicas):
    message = f"8 sequences cannot be dealt to {replicas} data replicas in micro-batches of {micro} and contrastive"
    with pytest.raises(ConfigError, match=message + f" groups of {group}: .*group_sequences"):
        check_dealing(8, group, micro, replicas)
