"""Chunks, their alignment with batches, and the baselines that need no model."""

import numpy as np
import pytest

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_member
from mmoe.data.load.tables import load_array
from mmoe.evaluation.actions import Chunks, align, chunk_starts, error_tables, hold_last, read_chunks, training_means
from mmoe.schema.modality import Modality


@pytest.fixture(scope="module")
def chunks(run) -> Chunks:
    return read_chunks(run.sources, run.tokenizers, "heldout")


def test_the_targets_of_the_batches_are_the_chunks(build_run, chunks):
    """A model that says the target itself has no error, also where clips are cut into parts."""
    run = build_run(data__sequence_length=90, training__global_batch_positions=360)
    parts, targets = [], []
    for batch in run.heldout(isolated=False):
        starts, of = chunk_starts(batch)
        np.testing.assert_array_equal(starts, batch.action_index.numpy())
        parts.append(of)
        targets.append(batch.action_target.double().numpy())
    cut = {tuple(part[:3]) for part in np.concatenate(parts) if part[3] > 0}
    assert cut, "no clip was cut: the test would not see a mistake"
    aligned = align(np.concatenate(parts), np.concatenate(targets), chunks)
    np.testing.assert_allclose(aligned, chunks.target, atol=1e-6)


def test_what_no_sequence_held_is_nan(chunks):
    kept = [key for key in chunks.keys if key != chunks.keys[0]]
    parts = np.array([(*key[:3], 0) for key in kept if key[:3] != chunks.keys[0][:3]])
    aligned = align(parts, np.zeros((len(parts), 1)), chunks)
    missing = [key[:3] == chunks.keys[0][:3] for key in chunks.keys]
    np.testing.assert_array_equal(np.isnan(aligned[:, 0]), missing)


def test_held_is_the_row_before_the_chunk(run, chunks):
    held = hold_last(chunks, np.full((4, 4, 2), 7.0))
    files = run.sources.files("heldout")[3]
    for number, (_, shard, row, count) in enumerate(chunks.keys):
        index = ShardIndex.read(files.tars[shard])
        segments = index.row_segments(row)
        segment = segments[segments["modality"] == Modality.ACTION][count]
        _, offset, size = index.row_member(row, int(segment["member"]))
        table = load_array(read_member(files.tars[shard], offset, size), "the table")
        tokenizer = run.tokenizers.actions["clip"]
        if segment["start"] == 0:
            assert not chunks.has_last[number] and (held[number] == 7.0).all()
        else:
            expected = tokenizer.normalize(table[segment["start"] - 1])
            np.testing.assert_allclose(held[number], np.tile(expected, (4, 1)), atol=1e-6)
    assert 0 < chunks.has_last.sum() < len(chunks)


def test_means_leave_padding_out():
    target = np.zeros((3, 2, 1))
    target[:, 0, 0], target[:, 1, 0] = [1, 2, 6], [4, 0, 0]
    mask = np.ones((3, 2, 1), bool)
    mask[1:, 1] = False
    empty = np.zeros(3)
    chunks = Chunks([(1, 0, 0, i) for i in range(3)], target, mask, target[:, 0], empty > 1, np.ones(3, int), empty, [])
    np.testing.assert_array_equal(training_means(chunks)[1], [[3.0], [4.0]])
    tables = error_tables({"model": np.full((3, 2, 1), 4.0)}, chunks, ("steer",), ["text", "drive"])
    assert tables["all"] == {"model": pytest.approx((9 + 4 + 4 + 0) / 4), "elements": 4}
    assert list(tables["by_source"]) == ["drive"]
    assert tables["by_step"][1] == {"model": 0.0, "elements": 1}
    assert tables["by_source_and_dimension"]["drive"]["steer"] == tables["all"]
