"""The guide to extensions shows the code that is tested here."""

import re

import pytest

from tests.conftest import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = [part for block in re.findall(r"```python\n(.*?)\n```", GUIDE, re.DOTALL) for part in block.split("\n\n\n")]
TESTED = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "tests" / "extension").glob("*.py"))
)


@pytest.mark.parametrize("part", BLOCKS, ids=lambda part: part.split("\n")[0])
def test_every_part_of_the_guide_stands_in_a_test(part):
    assert f"\n{part}\n" in TESTED


def test_every_sort_of_part_has_a_line_and_its_code():
    assert len(BLOCKS) >= 12
    for sort in (
        "LOSS_TERMS",
        "Modality.register",
        "SOURCES",
        "CALLBACKS",
        "SINKS",
        "ATTENTION_BACKENDS",
        "DISPATCHERS",
    ):
        assert sort in GUIDE
