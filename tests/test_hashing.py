"""Hashes give what they gave in every version before: weights, draws, splits and digests hang on them.

The numbers were written down from the functions that stood here and there before they had a module of their own.
"""

import numpy as np
import torch

from mmoe.data.index.shard_index import _digest as rows_digest
from mmoe.data.load.decord_proof import _digest as frame_digest
from mmoe.data.plan.blocks import units
from mmoe.hashing import INCREMENT, hash64, mixed_u64, seed64
from mmoe.models.moe.noise import gaussian, token_keys
from mmoe.preparation.signatures import shingles
from mmoe.preparation.sources.base import Item
from mmoe.preparation.splits import split_recordings
from mmoe.preparation.statistics import VectorSummary
from mmoe.schema.sample import SEGMENT_DTYPE
from mmoe.training.fingerprint import _digest as settings_digest


def test_words_are_mixed_as_ever():
    words = np.array([0, 1, 2**64 - 1, 12345678901234567890], np.uint64)
    assert mixed_u64(words + np.uint64(INCREMENT)).tolist() == [
        16294208416658607535,  # the first number of splitmix64 seeded by 0
        10451216379200822465,
        16490336266968443936,
        17967625711492519656,
    ]


def test_rows_enter_the_reservoir_by_the_same_numbers():
    summary = VectorSummary(1)
    summary.add(np.zeros((2, 1), np.float32), seed=-1)
    assert summary.priorities.tolist() == [16490336266968443936, 16294208416658607535]


def test_documents_draw_the_same_numbers():
    assert units(11, 2, 5, 3).tolist() == [0.06284036984986408, 0.38666152608576565, 0.7888532133485398]
    assert units(2**63, 0, 0, 1).tolist() == [0.3643475185461448]


def test_tokens_have_the_same_keys_and_noise():
    keys = token_keys(torch.tensor([[0, 1, 2], [-5, 2**62, 7]]))
    assert keys.tolist() == [
        [-4713456254625835353, -5412081249802187082, -949363134286525531],
        [-6529001371134248615, 7112990634904777969, 7813295877341952063],
    ]
    noise = gaussian(keys[0], 2, seed=3, layer=1)[:2]
    expected = [[0.6336941123008728, -0.8304917216300964], [1.1422702074050903, -0.6953803896903992]]
    torch.testing.assert_close(noise, torch.tensor(expected))  # to rounding, in which processors may differ


def test_parts_of_bytes_have_the_same_numbers_and_no_two_cuts_one():
    assert hash64() == -5426141060434712860
    assert hash64(b"") == 1786884285633530058
    assert hash64(b"a", b"bc") == -1869989609580755514
    assert hash64(b"ab", b"c") == 652078932630809789


def test_parameters_are_drawn_from_the_same_seeds():
    assert seed64("7/decoder.0.attention.output.weight") == -2773288852435230581


def test_runs_of_characters_have_the_same_hashes():
    assert shingles("One  hash, Ünïcode 😀", 8).tolist() == [
        *(196830662, 283458375, 1474969247, 1503200636, 1538121340, 1757284263),
        *(1909611991, 2535565507, 2648322894, 2804386305, 2952013507, 3569461736),
    ]


def test_the_same_recordings_are_held_out():
    items = [Item(f"clip-{n}", f"clip-{n}", bytes) for n in range(20)]
    drawn = [item.recording for item in split_recordings(items, 0.3, gap=0).heldout]
    assert drawn == ["clip-1", "clip-6", "clip-9", "clip-10", "clip-17", "clip-18"]


def test_settings_rows_and_frames_have_the_same_digests():
    assert settings_digest({"b": [1, 2.5, None], "a": "ü"}) == "89d819b1a297a5aa4e62de42c426eab2"
    assert frame_digest(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[:, ::-1]).hex() == "6f63619920ccda60"
    segments = np.zeros(2, SEGMENT_DTYPE)
    segments["start"] = [3, 4]
    row = {"key": "k", "recording": "r", "content_hash": -5, "members": [("jpg", 1, 2)]}
    row |= {"text_ids": np.array([1, 2]), "segments": segments}
    assert rows_digest([row]) == "62c2d18715630d049be75e89ad29f605"
    assert rows_digest([]) == "cae66941d9efbd404e4d88758ea67670"
