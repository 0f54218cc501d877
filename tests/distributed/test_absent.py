"""A step in which ranks have no images, no audio, no actions or no pairs ends on all, and is that of one process."""

from typing import Any

import pytest

from tests.distributed.compare import check
from tests.distributed.pool import Pool
from tests.distributed.step import POOR, Case

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "ep2": {"ep": 2}, "pp2": {"pp": 2}}


@pytest.mark.parametrize("absent", [(0, 3), (0, 1, 2, 3)], ids=["of one replica", "of all"])
@pytest.mark.parametrize("poor", [kind for kind in POOR if kind != "short"])
@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_what_ranks_lack_changes_nothing(
    two: Pool, parallel: dict[str, Any], poor: str, absent: tuple[int, ...]
) -> None:
    """The first and the last of four sequences are one of two replicas' whole share."""
    if poor == "nothing" and len(absent) == 4:
        absent = (0, 1, 3)  # a step has something
    expected = check(two, Case(micro=1, poor=dict.fromkeys(absent, poor), parallel=parallel))
    if len(absent) == 4:
        assert (expected["terms"].get("action", 0.0) == 0.0) == (poor != "no pairs")
        assert (float(expected["events"].get("contrastive", [0, 0])[1]) == 0.0) == (poor in ("text", "no pairs"))
