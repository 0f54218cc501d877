"""The plan: every document once an epoch, whole where it fits, in the shares asked for, the same after resume."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmoe.data.plan.blocks import CUT_SLICES, CUT_TEXT, FITS, units
from mmoe.data.plan.mixture import StageConfig
from mmoe.data.plan.planner import Planner, plan_once
from mmoe.errors import ConfigError, DataError
from mmoe.schema.counts import PATCHES, POSITIONS, Counts
from tests.data.streams import LENGTH, setup, write_folders
from tests.data.synthetic import MAKERS

NAMES = tuple(MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sources"))


def planner(folders, *, seed=3, end=10**9, **choices) -> Planner:
    config, sources, tokenizers = setup(folders, **choices)
    limits = config.limits(seed)
    return Planner(
        sources.planned("train", limits, tokenizers), sources.mixture(tokenizers, end), limits, config.window_documents
    )


def weights(*values, names=NAMES) -> dict[str, StageConfig]:
    return {"all": StageConfig(weights=dict(zip(names, values, strict=True)))}


def of_windows(plan: Planner, windows: int) -> list:
    """The sequences of the first windows, all of them."""
    found = []
    while True:
        sequence = plan.next_sequence()
        if plan.state["window"] == windows:
            return found
        found.append(sequence)


def digest(sequence) -> tuple:
    return sequence.number, sequence.parts.tobytes(), sequence.counts.columns.tobytes()


@given(seed=st.integers(0, 2**40), window=st.integers(1, 90), length=st.integers(90, 400), isolated=st.floats(0, 1))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_document_comes_exactly_once_an_epoch_in_whole_slices(folders, seed, window, length, isolated):
    names = NAMES if length > 130 else ("text", "image", "audio")  # a slice takes up to 130 positions
    plan = planner(folders, seed=seed, window_documents=window, sequence_length=length, share=isolated, names=names)
    sequences = of_windows(plan, max(1, 300 // window))
    parts = np.concatenate([s.parts for s in sequences])
    for source in plan.sources:
        mine = parts[parts["source"] == source.number]
        drawn = plan.state["drawn"][source.number]
        begun = mine[mine["part"] == 0]
        seen = np.zeros((len(source.shards), source.shard_rows.max()), int)
        np.add.at(seen, (begun["shard"], begun["row"]), 1)
        counts = seen[np.arange(seen.shape[1]) < source.shard_rows[:, None]]
        lost = drawn - len(begun)  # documents that fit nowhere
        assert lost == 0 or any("dropped" in reason for reason in plan.state["lost"])
        assert counts.max() <= -(-drawn // source.rows) and counts.sum() == len(begun)
        if not lost:
            assert counts.min() >= drawn // source.rows
        # The parts of a document are all there, and meet end to end: nothing between two slices is lost.
        assert (mine["first"][mine["part"] == 0] == 0).all()
        ends = mine["is_last"].sum()
        assert ends == len(begun)
        covered = np.zeros_like(seen)
        np.add.at(covered, (mine["shard"], mine["row"]), mine["last"] - mine["first"])
        each = covered[seen > 0] / seen[seen > 0]
        assert (each == np.rint(each)).all()
    for sequence in sequences:
        assert sequence.counts.positions == sequence.parts["length"].sum() <= length
        assert sequence.counts.patches <= length
    assert [s.number for s in sequences] == list(range(len(sequences)))


@pytest.mark.parametrize("patches", [0, 40])
def test_a_document_that_fits_is_never_cut_and_cuts_are_counted(folders, patches):
    plan = planner(folders, patches_per_sequence=patches)
    most = patches or LENGTH
    of_windows(plan, 20)
    lost = 0
    for source in plan.sources:
        block, _ = source.at(0)
        patch = np.array([block.counts[a:b, PATCHES].sum() for a, b in zip(block.offsets, block.offsets[1:])])
        fits = (block.lengths <= LENGTH) & (patch <= most)
        assert (block.outcome[fits & (block.lengths > 0)] == FITS).all()
        cut = np.flatnonzero((block.outcome == CUT_TEXT) | (block.outcome == CUT_SLICES))
        for document in cut:
            parts = block.parts[block.offsets[document] : block.offsets[document + 1]]
            counts = block.counts[block.offsets[document] : block.offsets[document + 1]]
            assert (parts["first"][1:] == parts["last"][:-1]).all() and len(parts) > 1
            # No two neighbors would have fitted together: the cut is as late as can be.
            together = counts[:-1, POSITIONS] + counts[1:, POSITIONS]
            assert (counts[:, POSITIONS] <= LENGTH).all() and (counts[:, PATCHES] <= most).all()
            assert ((together > LENGTH * 0.5) | (counts[:-1, PATCHES] + counts[1:, PATCHES] > most * 0.5)).all()
        lost += len(cut)
    assert lost > 0 and plan.state["lost"]


@pytest.mark.parametrize("name", NAMES)
def test_once_plans_every_part_of_every_document_exactly_once(folders, name):
    config, sources, tokenizers = setup(folders, names=(name,))
    limits = config.limits(3, isolated_pair_share=1.0)
    planned = sources.planned("train", limits, tokenizers)
    sequences = plan_once(planned, limits)
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for ref in (ref for sequence in sequences for ref in sequence.documents):
        found.setdefault((ref.shard, ref.row), []).append((ref.first, ref.last))
    assert len(found) == planned[0].rows
    for parts in found.values():
        parts.sort()
        assert parts[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all(s.counts.positions <= LENGTH for s in sequences)
    some = {(r.shard, r.row) for s in plan_once(planned, limits, most_documents=5) for r in s.documents}
    assert len(some) == 5 and some < found.keys()


def test_the_documents_of_a_window_are_those_of_the_greedy_rule(folders):
    """One by one from the source furthest behind its share, as the rule is stated; the plan finds them by a sort."""
    shares = np.array([0.4, 0.1, 0.05, 0.45])
    plan = planner(folders, stages=weights(*shares), window_documents=33)
    drawn, served = [0] * 4, np.zeros(4)
    exact = plan.mixture.shares(0)
    for window in range(6):
        deficit = np.array(plan.state["deficit"])
        inside = np.zeros(4)
        for _ in range(33):
            number = int(np.argmin((inside - deficit) / exact))
            block, at = plan.sources[number].at(drawn[number])
            inside[number] += block.lengths[at]
            drawn[number] += 1
        served += inside
        while plan.state["window"] == window:
            plan.next_sequence()
        assert plan.state["drawn"] == drawn and plan.state["served"] == served.tolist()


def test_after_a_thousand_batches_every_share_is_on_its_target(folders):
    shares = (0.6, 0.3, 0.07, 0.03)
    plan = planner(folders, stages=weights(*shares), window_documents=400)
    positions = np.zeros(4)
    for _ in range(1000 * 4):
        parts = plan.next_sequence().parts
        np.add.at(positions, parts["source"], parts["length"])
    realized = positions / positions.sum()
    for share, found in zip(shares, realized, strict=True):
        assert abs(found - share) < 0.005
        assert share >= 0.05 or abs(found / share - 1) < 0.05


def test_stages_end_at_their_border_whatever_the_window(folders):
    """Where documents are no longer than a sequence; a longer one brings all its parts along."""
    stages = {
        "cold": StageConfig(until=LENGTH * 23, temperature=1.0, sources=("text", "image")),
        "mid": StageConfig(until=LENGTH * 60 + 7, temperature=(1.0, 4.0), sources=("audio",)),
        "hot": StageConfig(temperature=1.0, sources=("text",)),
    }
    for window in (5, 40, 400):
        plan = planner(folders, stages=stages, window_documents=window, end=LENGTH * 90)
        drawn = [set(plan.next_sequence().parts["source"].tolist()) for _ in range(90)]
        assert set.union(*drawn[:23]) == {0, 1} and set.union(*drawn[23:61]) == {2} and set.union(*drawn[61:]) == {0}


def test_a_moving_temperature_moves_the_shares(folders):
    stages = {"all": StageConfig(temperature=(1.0, 8.0), sources=("text", "clip"))}
    plan = planner(folders, stages=stages, window_documents=12, end=LENGTH * 600)
    sequences = [plan.next_sequence() for _ in range(600)]

    def share(chosen) -> float:
        parts = np.concatenate([s.parts for s in chosen])
        return parts["length"][parts["source"] == 0].sum() / parts["length"].sum()

    expected = [np.mean([plan.mixture.shares(n * LENGTH)[0] for n in r]) for r in (range(150), range(450, 600))]
    found = [share(sequences[:150]), share(sequences[450:])]
    assert found == pytest.approx(expected, abs=0.02) and expected[1] > expected[0] + 0.05


@given(cut=st.integers(0, 120), seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restored_plan_goes_on_exactly(folders, cut, seed):
    stages = {"a": StageConfig(until=LENGTH * 50, temperature=1.0), "b": StageConfig(temperature=5.0)}
    whole = planner(folders, seed=seed, stages=stages)
    for _ in range(cut):
        whole.next_sequence()
    state = whole.state
    resumed = planner(folders, seed=seed, stages=stages)
    resumed.restore(state)
    for _ in range(40):
        assert digest(whole.next_sequence()) == digest(resumed.next_sequence())
    assert whole.state == resumed.state and whole.lost == resumed.lost


def test_the_seed_decides_the_order(folders):
    orders = {digest(planner(folders, seed=seed).next_sequence())[1] for seed in range(6)}
    assert len(orders) == 6


def test_keyed_numbers_are_even_and_depend_on_every_part_of_the_key():
    found = units(7, 1, 0, 100_000)
    assert np.abs(np.histogram(found, 20, (0, 1))[0] / 5000 - 1).max() < 0.06
    assert np.array_equal(units(7, 1, 500, 10), found[500:510])
    for other in (units(8, 1, 0, 1000), units(7, 2, 0, 1000), units(7, 1, 1, 1000)):
        assert (other != found[:1000]).all()


def test_a_source_of_another_checkpoint_is_refused(folders):
    plan = planner(folders)
    with pytest.raises(ConfigError, match="has 4 sources, the config 1"):
        planner(folders, names=("text",)).restore(plan.state)


def test_a_slice_longer_than_a_sequence_stops_at_start_and_names_the_knobs(folders):
    with pytest.raises(ConfigError, match="a slice is never split: raise them, or lower tokenizers.vision.max_patches"):
        planner(folders, names=("clip",), sequence_length=24)


def test_a_long_slice_that_turns_up_later_is_dropped_and_counted(folders):
    """The first shard fits; a clip of a later one has a slice that does not."""
    plan = planner(folders, names=("clip",), sequence_length=110)
    of_windows(plan, 3)
    assert plan.state["lost"]["clip / dropped: a slice longer than a sequence"] > 0


def test_a_source_of_which_nothing_fits_is_refused(folders):
    with pytest.raises(ConfigError, match="no document of source audio fits"):
        planner(folders, names=("audio",), sequence_length=9).next_sequence()


def test_an_empty_split_is_refused(folders):
    config, sources, tokenizers = setup(folders)
    with pytest.raises(DataError, match="the split test is empty"):
        sources.planned("test", config.limits(0), tokenizers)


def test_counts_add():
    columns = np.arange(12)
    total = Counts.total([Counts(columns), Counts(columns)])
    assert total.columns.tolist() == (2 * columns).tolist() and Counts.total([]).positions == 0


@given(cut=st.integers(0, 60))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_window_that_is_begun_ends_as_planned_where_the_run_is_made_longer(folders, cut):
    """The shares of a moving temperature follow the run's length; a window planned anew would skip and repeat."""
    moving = {"all": StageConfig(temperature=(0.5, 4.0))}
    whole, longer = (planner(folders, stages=moving, end=end) for end in (LENGTH * 60, LENGTH * 300))
    for _ in range(cut):
        whole.next_sequence()
    longer.restore(json.loads(json.dumps(whole.state)))
    window = whole.state["window"]
    while True:
        planned, found = whole.next_sequence(), longer.next_sequence()
        if whole.state["window"] != window:
            break
        assert digest(planned) == digest(found)
    assert longer.state["window"] == whole.state["window"] and longer.state["drawn"] == whole.state["drawn"]
    if cut:
        assert longer.state["shares"] != whole.state["shares"]
