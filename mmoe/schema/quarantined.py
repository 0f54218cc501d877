"""Defines the record of a document part that could not be decoded."""

from typing import NamedTuple


class Quarantined(NamedTuple):
    """Names a document part that became padding: its source's number, shard, row and key, the reason, its positions."""

    source: int
    shard: str
    row: int
    key: str
    reason: str
    positions: int
