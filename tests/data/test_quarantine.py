"""What a full disk does to the list of samples that could not be decoded."""

from pathlib import Path

import pytest

from mmoe.data.load.quarantine import Quarantine
from mmoe.errors import OutputError
from mmoe.schema.quarantined import Quarantined


def test_a_list_that_cannot_be_written_is_one_sentence_and_the_sample_counts_once_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "quarantine.jsonl").symlink_to("/dev/full")
    quarantine = Quarantine(["drive"], 0.01, tmp_path / "quarantine.jsonl")
    lost = (Quarantined(0, "train/shard-000000.tar", 3, "a", "cut off", 12),)
    with pytest.raises(OutputError, match="quarantine.jsonl cannot be written .No space left.*last checkpoint"):
        quarantine.add({0: 5}, lost)
    (tmp_path / "quarantine.jsonl").unlink()
    quarantine.add({0: 5}, lost)
    quarantine.settle(lambda counts: counts)
    assert quarantine.lost == {"drive": 1} and len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
