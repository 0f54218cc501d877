"""How long a step waited for its data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class DataWait:
    """Adds up the time that iterators take to give their next item."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """Give the items, and count the time until each was there."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - started
            yield item

    def take(self) -> float:
        """Give the seconds since it was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
