"""Records are read a line at a time; what is damaged is named by file and line."""

import json
import tracemalloc

import numpy as np
import pytest

from mmoe.errors import DataError
from mmoe.monitoring.reader import RunReader
from tests.monitoring.test_summary import line


def write(folder, *lines: dict, end: str = "") -> RunReader:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines) + end)
    return RunReader(folder)


def test_columns_hold_what_was_recorded_and_nan_where_it_was_not(tmp_path):
    reader = write(tmp_path, line(10, mfu=0.5), line(20), line(30, mfu=0.25))
    columns = reader.columns("loss", "mfu")
    assert columns["step"].tolist() == [10, 20, 30] and columns["loss"].tolist() == [1 / 10, 1 / 20, 1 / 30]
    np.testing.assert_array_equal(columns["mfu"], [0.5, np.nan, 0.25])
    assert reader.last() == line(30, mfu=0.25)
    assert len(reader.undone("loss")["step"]) == 0 and reader.table_names() == []
    assert list(reader.tables("expert_load")) == []


@pytest.mark.parametrize("end", ['{"step": 2, "lo', "{", '{"step": 2, "note": "\u00e4'])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, end):
    reader = write(tmp_path, line(1), end=end)
    assert reader.columns()["step"].tolist() == [1] and reader.last()["step"] == 1


@pytest.mark.parametrize("damaged", ['{"step": 2, "lo', "[1]", "{}", '{"step": "2"}', "\x00\x00"])
def test_any_other_damage_is_named_by_file_and_line(tmp_path, damaged):
    reader = write(tmp_path, line(1), end=f"{damaged}\n{json.dumps(line(3))}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is not .*remove that line"):
        reader.columns()
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line(1))}\n{damaged}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is not .*remove that line"):
        reader.last()


def test_the_last_record_is_found_where_lines_are_longer_than_what_is_read_at_once(tmp_path):
    reader = write(tmp_path, *({"step": step, "note": "x" * 300_000} for step in (1, 2, 3)), end='{"torn')
    assert reader.last()["step"] == 3


def test_reading_columns_takes_the_memory_of_the_columns(tmp_path):
    reader = write(tmp_path, *(line(step, note="x" * 2000) for step in range(1, 10_001)))
    assert reader.path.stat().st_size > 20e6
    tracemalloc.start()
    reader.columns("loss")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
