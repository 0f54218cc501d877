from pathlib import Path

import pytest

from mmoe.monitoring.metrics import _board
from mmoe.optional import BACKENDS, Backend, status


def test_tensorboard_is_written_where_it_is_wanted_or_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status.cache_clear()
    assert _board(tmp_path, False) is None and not any(tmp_path.iterdir())
    writer = _board(tmp_path, None)
    writer.close()
    assert any(tmp_path.iterdir())
    status.cache_clear()
    monkeypatch.setitem(BACKENDS, "tensorboard", Backend("scalar logs", "mmoe_no_such_module", "tensorboard", "x"))
    assert _board(tmp_path, None) is None
    status.cache_clear()
