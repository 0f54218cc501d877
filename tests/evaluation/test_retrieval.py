"""Recall on embeddings whose recall is known."""

import numpy as np
import pytest

from mmoe.evaluation.retrieval import POOL, hits, recall


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(pairs: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(pairs, 32)))


def test_equal_sides_are_always_found():
    sides = embeddings(200)
    entry = recall(sides, sides, np.arange(200), seed=0)
    assert (entry["r1"], entry["r5"], entry["pool"]) == (1.0, 1.0, 64)
    assert 0.95 < entry["r1_low"] < 1.0


def test_unrelated_sides_are_found_by_chance_and_the_bound_says_so():
    figures = [recall(embeddings(300, 2 * s), embeddings(300, 2 * s + 1), np.arange(300), s) for s in range(20)]
    assert np.mean([f["r1"] for f in figures]) == pytest.approx(1 / 64, abs=0.006)
    assert np.mean([f["r5"] for f in figures]) == pytest.approx(5 / 64, abs=0.015)
    assert max(f["r1_low"] for f in figures) < 0.06


def test_a_collapsed_model_finds_nothing():
    same = unit(np.ones((100, 8)))
    entry = recall(same, same, np.arange(100), seed=0)
    assert (entry["r1"], entry["r5"], entry["r1_low"]) == (0.0, 0.0, 0.0)


def test_a_broken_model_finds_nothing():
    broken = np.full((100, 8), np.nan)
    entry = recall(broken, broken, np.arange(100), seed=0)
    assert entry["r1"] == entry["r5"] == entry["r1_low"] == 0.0


def test_rank_is_the_number_of_candidates_that_are_not_worse():
    text, other = np.eye(8), np.eye(8)
    other[0] = other[1]  # query 0 ties with candidate 1 on nothing, and loses its partner to it
    found = hits(text, other)
    assert found.shape == (2, 2, 8)
    assert not found[0, 0, 0] and not found[0, 0, 1]  # text 1 has two equal candidates
    assert found[0, 0, 2:].all() and found[1, 0, 2:].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_candidate_that_is_the_same_is_before_the_partner_whichever_way_the_last_bit_falls(dtype):
    text = embeddings(8, 1).astype(dtype)
    for first, second in ((0, 1), (1, 0)):
        other = text.copy()
        other[second] = other[first]
        assert not hits(text, other)[0, 0, first]
        other[first] += 16 * np.finfo(dtype).eps * text[first]
        assert not hits(text, other)[0, 0, first] and hits(text, other)[0, 1, first]


def test_pools_never_hold_a_caption_twice(monkeypatch):
    """With equal captions in one pool a perfect model could not reach 1."""
    captions = np.repeat(np.arange(70), 5)
    sides = embeddings(70)[captions]
    assert recall(sides, sides, captions, seed=3)["r1"] == 1.0


def test_too_few_captions_are_reported_with_the_pool_there_is():
    captions = np.repeat(np.arange(10), 30)
    sides = embeddings(300)
    entry = recall(sides, sides, captions, seed=0)
    assert entry["r1"] is None and entry["pool"] == POOL
    assert "10 different captions" in entry["reason"]
    assert entry["smaller_pool"]["pool"] == 10 and entry["smaller_pool"]["r1"] == 1.0
    assert recall(sides[:5], sides[:5], np.zeros(5), seed=0)["smaller_pool"] is None


def test_pools_are_seeded():
    first = [recall(embeddings(200, 1), embeddings(200, 2), np.arange(200), seed) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_both_directions_are_asked():
    """A text that is close to everything is found by its own image, and keeps the other images from theirs."""
    other = unit(np.eye(8) + 0.5)
    text = np.eye(8)
    text[0] = 10 * other[0]
    found = hits(text, other)
    assert found[0, 0].all()  # text to other
    assert found[1, 0].tolist() == [True] + [False] * 7
