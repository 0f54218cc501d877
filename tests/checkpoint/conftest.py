"""What all tests of checkpoints share."""

import os

import pytest


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """When files are synced is tested; that a sync reaches the disk is the kernel's promise, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
