"""Donors come from other recordings; what is blank is zero and nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.data.index.shard_index import ShardIndex
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation import ablation
from mmoe.evaluation.ablation import _Row, derange
from mmoe.schema.modality import Modality

ROWS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([(0,), (0, 1), (1,)])), min_size=1, max_size=40)


def rows(items) -> list[_Row]:
    return [_Row(0, number, f"r{recording}", frozenset(cameras)) for number, (recording, cameras) in enumerate(items)]


@settings(deadline=None)
@given(ROWS, st.integers(0, 9))
def test_a_donor_is_of_another_recording_and_has_the_cameras(items, seed):
    given_rows = rows(items)
    donors = derange(given_rows, np.random.default_rng(seed))
    possible = all(
        any(d.recording != row.recording and d.cameras >= row.cameras for d in given_rows) for row in given_rows
    )
    assert (donors is not None) == possible
    for row, donor in zip(given_rows, donors or []):
        assert donor.recording != row.recording
        assert donor.cameras >= row.cameras


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 9))
def test_every_row_gives_once_unless_one_recording_has_most_of_them(recordings, seed):
    donors = derange(rows([(r, (0,)) for r in recordings]), np.random.default_rng(seed))
    if 2 * max(map(recordings.count, recordings)) <= len(recordings):
        assert sorted(donor.row for donor in donors) == list(range(len(recordings)))


def test_the_split_is_shuffled_the_same_way_every_time(run):
    first, again = (ablation.shuffle(run.sources, "heldout", Modality.VISION, 0) for _ in range(2))
    other = ablation.shuffle(run.sources, "heldout", Modality.VISION, 1)
    assert first.ablation.donors == again.ablation.donors != other.ablation.donors
    assert first.record() == {
        "mode": "shuffle",
        "modality": "vision",
        "rows": {"image": 10, "clip": 10},
        "left_out": {},
    }


def test_a_source_of_one_recording_is_left_out_with_the_reason():
    assert derange(rows([(0, (0,)), (0, (0,))]), np.random.default_rng(0)) is None


@pytest.mark.parametrize("modality", [Modality.VISION, Modality.INERTIAL, Modality.STATE])
def test_blank_is_zero_and_shuffle_moves_what_there_is(run, modality):
    def vectors(taken) -> tuple[torch.Tensor, ...]:
        batches = list(run.heldout(isolated=False, only=["clip"], stand_in=taken))
        values = torch.cat([b.values[modality].values[b.values[modality].index >= 0] for b in batches])
        return values[:, :64], torch.cat([b.token_ids.flatten() for b in batches])

    plain, blank, shuffled = (
        vectors(taken.ablation if taken else None)
        for taken in (None, ablation.blank(modality), ablation.shuffle(run.sources, "heldout", modality, 0))
    )
    assert plain[0].any() and not blank[0].any()
    assert not torch.equal(plain[0], shuffled[0]) and shuffled[0].any()
    assert torch.equal(plain[1], blank[1]) and torch.equal(plain[1], shuffled[1])


def test_a_donor_without_the_modality_is_named(run):
    source = run.sources.names.index("image")
    index = ShardIndex.read(run.sources.files("heldout")[source].tars[0])
    segments = index.row_segments(0).copy()
    segments["modality"] = Modality.AUDIO
    taken = ablation.Ablation("shuffle", Modality.AUDIO, {(source, 0, 0): (0, 1)})
    with pytest.raises(DataError, match=f"{index.keys[1]} has nothing of modality AUDIO to stand in for .*another"):
        taken((source, 0, 0), lambda *_: index, segments, 0)


def test_what_cannot_be_taken_away_is_refused(run):
    with pytest.raises(ConfigError, match="--blank text is not possible; choose from vision, audio"):
        ablation.blank(Modality.TEXT)
    with pytest.raises(ConfigError, match="--shuffle action"):
        ablation.shuffle(run.sources, "heldout", Modality.ACTION, 0)
