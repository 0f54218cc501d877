"""One pool of processes for each world size, for all tests that ask for it."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(2, tmp_path_factory.mktemp("two")) as pool:
        yield pool


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(4, tmp_path_factory.mktemp("four")) as pool:
        yield pool


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(8, tmp_path_factory.mktemp("eight")) as pool:
        yield pool
