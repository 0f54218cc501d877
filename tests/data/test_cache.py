"""The cache on disk: bounded, last used stays, whole or absent, also with several processes on one folder."""

import multiprocessing
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.data.storage.cache import ByteCache

HEADER = 16


def entries(cache: ByteCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("??/*"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 900)), max_size=60), st.integers(100, 4000))
def test_it_is_never_above_its_limit_and_gives_back_what_was_put(tmp_path_factory, calls, limit):
    cache = ByteCache(tmp_path_factory.mktemp("cache"), limit)
    put: dict[str, bytes] = {}  # in order of last use
    for is_put, number, size in calls:
        key = f"key {number}"
        content = put.get(key, bytes([number]) * size)
        if is_put and HEADER + len(content) <= limit:
            cache.put(key, content)
            put[key] = content
        found = cache.get(key)
        assert found == (content if key in put and cache._path(key).exists() else None)
        if found is not None:
            put[key] = put.pop(key)
        assert entries(cache) <= limit and not list((cache.folder / "unfinished").iterdir())
        there = [cache._path(key).exists() for key in put]
        assert there == sorted(there)  # what is gone was used before all that is left
        put = {key: content for key, content in put.items() if cache._path(key).exists()}


def test_what_was_read_last_outlives_what_was_written_last(tmp_path):
    cache = ByteCache(tmp_path, 10 * (100 + HEADER))
    for number in range(10):
        cache.put(str(number), bytes(100))
    cache.get("0")
    cache.put("new", bytes(100))
    assert cache.get("0") and cache.get("new") and cache.get("1") is None


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b[:-1] + b"x"])
def test_an_entry_that_a_crash_left_torn_is_dropped(tmp_path, damage):
    cache = ByteCache(tmp_path, 1000)
    cache.put("key", b"content")
    path = cache._path("key")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("key") is None and not path.exists()
    cache.put("key", b"content")
    assert cache.get("key") == b"content"


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(200 + number)


def hammer(folder, seed: int) -> int:
    cache, draws = ByteCache(folder, 6000), random.Random(seed)
    hits = 0
    for _ in range(400):
        number = draws.randrange(40)
        found = cache.get(str(number))
        if found is None:
            cache.put(str(number), content_of(number))
        else:
            hits += 1
            assert found == content_of(number)
        assert entries_now(cache) <= 6000
    return hits


def entries_now(cache: ByteCache) -> int:
    """What the folder holds while nobody writes."""
    with cache._locked():
        return entries(cache) if random.random() < 0.2 else 0


def test_processes_share_a_folder_and_read_nothing_torn(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        hits = pool.starmap(hammer, [(tmp_path, seed) for seed in range(4)])
    assert sum(hits) > 100 and 0 < entries(ByteCache(tmp_path, 6000)) <= 6000
