"""What sinks hold is what a list would hold, whatever is written, undone, refused by the disk, and killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmoe.config.load import validate
from mmoe.errors import ConfigError, DataError, OutputError
from mmoe.monitoring import tables
from mmoe.monitoring.reader import RunReader, read_lines
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks import Sink
from mmoe.monitoring.sinks.arrays import ArraysConfig
from mmoe.monitoring.sinks.jsonl import JsonlConfig
from mmoe.monitoring.sinks.tensorboard import TensorboardConfig
from mmoe.recipe.monitoring import MonitoringConfig, SinkContext
from tests.conftest import REPOSITORY

PART = 3


def record(step: int, mark: int, experts: int = 2) -> StepRecord:
    """`mark` makes it unlike any other record of that step."""
    table = np.array([[step, mark], [2**40 if step == 5 else 0, 1]][:experts])
    return StepRecord(step, 0, {"mark": mark}, {"load": table, "mean": np.float32([step / 3])}, {"stage": "hot"})


def sinks(folder: Path) -> dict[str, Sink]:
    context = SinkContext(folder, {})
    arrays = ArraysConfig(records_per_part=PART, flush_seconds=1e9)
    return {"jsonl": JsonlConfig().build(context), "arrays": arrays.build(context)}


def lines(folder: Path, name: str = "metrics.jsonl") -> list[tuple[int, int]]:
    path = folder / name
    return [(line["step"], line["mark"]) for line in read_lines(path)] if path.exists() else []


def stored(folder: Path) -> list[tuple[int, int]]:
    chunks = RunReader(folder).tables("load")
    return [(step, int(table[0, 1])) for chunk in chunks for step, table in zip(chunk.steps.tolist(), chunk.values)]


@contextmanager
def full_disk():
    """Nothing can be written: neither lines nor files."""
    kept = os.write, os.fsync

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.write = os.fsync = refuse
    try:
        yield
    finally:
        os.write, os.fsync = kept


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 5)),
    st.tuples(st.just("write, refused"), st.integers(1, 3)),
    st.tuples(st.just("save"), st.just(0)),
    st.tuples(st.just("save, refused"), st.just(0)),
    st.tuples(st.just("roll back"), st.integers(0, 3)),
    st.tuples(st.just("kill"), st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=14))
def test_sinks_hold_what_a_list_holds_over_writes_refusals_rollbacks_and_kills(actions):
    """Both ways back lead to a checkpoint: what came after it is undone, what came before it is all there, once."""
    with tempfile.TemporaryDirectory() as name:
        folder, held, undone, mark = Path(name), [], [], 0
        checkpoints = [(0, {})]
        made = sinks(folder)
        for sink in made.values():
            sink.rewind(0)
        for action, number in actions:
            kind, _, refused = action.partition(", ")
            if kind == "write":
                for _ in range(number):
                    mark += 1
                    held.append((held[-1][0] + 1 if held else 1, mark))
                    for sink in made.values():
                        with full_disk() if refused else nullcontext(), suppress(OutputError):
                            sink.write(record(*held[-1]))
            elif kind == "save":
                with full_disk() if refused else nullcontext():
                    state = {name: sink.state_dict() for name, sink in made.items()}
                checkpoints.append((held[-1][0] if held else 0, json.loads(json.dumps(state))))
            else:
                del checkpoints[number + 1 :]
                step, state = checkpoints[-1]
                there = lines(folder)
                if kind == "kill":
                    made = sinks(folder)
                undone += [item for item in held if item[0] > step and (kind != "kill" or item in there)]
                held = [item for item in held if item[0] <= step]
                for name, sink in made.items():
                    sink.load_state_dict(state.get(name, {}))
                    sink.rewind(step)
        for sink in made.values():
            held_last = (held[-1][0] + 1 if held else 1, mark + 1)
            sink.write(record(*held_last))
            sink.close()
        held.append(held_last)
        assert lines(folder) == held and stored(folder) == held
        assert sorted(lines(folder, "metrics-undone.jsonl")) == sorted(undone)
        sizes = [pq.ParquetFile(path).metadata.num_rows for _, path in tables.part_files(folder / "tables")]
        assert max(sizes) <= PART


WRITER = """
import sys
from pathlib import Path
from tests.monitoring.test_sinks import record, sinks
made = sinks(Path(sys.argv[1]))
for sink in made.values():
    sink.rewind(int(sys.argv[2]))
print("ready", flush=True)
for step in range(int(sys.argv[2]) + 1, 10**6):
    for sink in made.values():
        sink.write(record(step, int(sys.argv[3])))
"""


def test_a_writer_that_is_killed_in_the_middle_leaves_whole_records_and_goes_on(tmp_path):
    begin = 0
    for session in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(begin), str(session)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
        assert writer.stdout.readline() == b"ready\n"
        size = (tmp_path / "metrics.jsonl").stat().st_size
        while (tmp_path / "metrics.jsonl").stat().st_size < size + 3000 * (session + 1):
            pass
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        steps = [step for step, _ in lines(tmp_path)]
        assert steps == list(range(1, len(steps) + 1))
        there = [step for step, _ in stored(tmp_path)]
        assert there == list(range(1, len(there) + 1)) and len(there) >= len(steps) - PART
        begin = min(steps[-1], there[-1]) - 4
    made = sinks(tmp_path)
    for sink in made.values():
        sink.rewind(begin)
    marks = dict(lines(tmp_path))
    assert list(marks) == list(range(1, begin + 1)) and dict(stored(tmp_path)) == marks
    assert not list((tmp_path / "tables").glob(".*"))
    undone = lines(tmp_path, "metrics-undone.jsonl")
    assert len(set(undone)) == len(undone) and not set(undone) & set(marks.items())


@pytest.mark.parametrize("copied", [0, 1, 40, 10**6])
def test_a_move_of_undone_lines_that_was_cut_short_goes_on(tmp_path, copied):
    """Killed after so many bytes were copied, and before the lines were cut off."""
    made = sinks(tmp_path)["jsonl"]
    for step in range(1, 9):
        made.write(record(step, step))
    made.close()
    late = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[5:]
    (tmp_path / "metrics-undone.jsonl").write_bytes(b'{"step": 3, "mark": 99}\n' + b"".join(late)[:copied])
    sinks(tmp_path)["jsonl"].rewind(5)
    assert lines(tmp_path) == [(step, step) for step in range(1, 6)]
    assert lines(tmp_path, "metrics-undone.jsonl") == [(3, 99), (6, 6), (7, 7), (8, 8)]


def test_lines_that_the_disk_refused_before_a_checkpoint_and_took_after_it_are_there_once(tmp_path):
    made = sinks(tmp_path)["jsonl"]
    made.write(record(1, 1))
    with full_disk(), pytest.raises(OutputError, match="metrics.jsonl cannot be written .No space.*kept in the check"):
        made.write(record(2, 2))
    state = made.state_dict()
    made.write(record(3, 3))
    again = sinks(tmp_path)["jsonl"]
    again.load_state_dict(state)
    again.rewind(2)
    assert lines(tmp_path) == [(1, 1), (2, 2)]


def test_tables_come_back_as_they_were_and_parts_out_of_range_are_not_read(tmp_path):
    made = sinks(tmp_path)["arrays"]
    for step in range(1, 9):
        made.write(record(step, 7))
    made.write(StepRecord(9, 0, {"loss": 1.0}))  # no tables: nothing to keep
    made.close()
    (load,) = RunReader(tmp_path).tables("load", 4, 6)
    assert load.steps.tolist() == [5, 6] and load.values.dtype == np.int64
    assert load.values.tolist() == [record(5, 7).tables["load"].tolist(), record(6, 7).tables["load"].tolist()]
    means = np.concatenate([chunk.values for chunk in RunReader(tmp_path).tables("mean")])
    assert means.dtype == np.float32 and (means[:, 0] == np.arange(1, 9, dtype=np.float32) / 3).all()
    assert RunReader(tmp_path).table_names() == ["load", "mean"]
    tables.part_path(tmp_path / "tables", 7).write_bytes(b"damaged")
    assert len(list(RunReader(tmp_path).tables("load", 0, 6))) == 2
    with pytest.raises(DataError, match=r"step-000000007.parquet cannot be read as a part.*delete it"):
        list(RunReader(tmp_path).tables("load"))


def test_tables_of_another_shape_begin_another_part(tmp_path):
    made = sinks(tmp_path)["arrays"]
    for step in range(1, 5):
        made.write(record(step, 1, experts=1 if step == 2 else 2))
    made.close()
    assert [chunk.values.shape for chunk in RunReader(tmp_path).tables("load")] == [(1, 2, 2), (1, 1, 2), (2, 2, 2)]


def test_a_store_of_another_version_is_refused_and_left_as_it_is(tmp_path):
    made = sinks(tmp_path)["arrays"]
    for step in range(1, 9):
        made.write(record(step, 1))
    made.close()
    for _, path in tables.part_files(tmp_path / "tables"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"mmoe.tables": b"2"}), path)
    before = {path: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    with pytest.raises(DataError, match="is of format 2, and this version of mmoe reads format 1 of tables/.*move"):
        sinks(tmp_path)["arrays"].rewind(2)
    assert {path: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == before


def test_a_config_names_sinks_by_kind_and_is_told_of_one_that_is_none_and_of_two_of_one_name():
    def config(*kinds: dict) -> MonitoringConfig:
        return validate(MonitoringConfig, {"sinks": list(kinds)}, "test")

    board = config({"kind": "jsonl"}, {"kind": "wandb", "project": "p"}).sinks[1]
    assert board.project == "p" and board.label == "wandb"
    with pytest.raises(ConfigError, match="tensorbord' is not a kind of sink; did you mean tensorboard"):
        config({"kind": "tensorbord"})
    with pytest.raises(ConfigError, match="two are named jsonl"):
        config({"kind": "jsonl"}, {"kind": "jsonl"})
    with pytest.raises(ConfigError, match="project"):
        config({"kind": "wandb"})
    dumped = config({"kind": "arrays", "records_per_part": 5}).model_dump(mode="json")
    assert validate(MonitoringConfig, dumped, "test").sinks[0].records_per_part == 5


@pytest.mark.parametrize("torn", [0, 1, 9, 30])
def test_tensorboard_shows_no_point_that_a_run_has_undone_whatever_a_kill_has_left_of_the_last_one(tmp_path, torn):
    """Steps 1 to 6, of which the last may be cut off; the run goes on after step 3 and ends with 4."""

    def board(begin: int, marks: dict[int, int]) -> None:
        sink = TensorboardConfig().build(SinkContext(tmp_path, {}))
        sink.rewind(begin)
        for step, mark in marks.items():
            sink.write(record(step, mark))
        sink.close()

    board(0, {step: step for step in range(1, 7)})
    (events,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - torn)
    before = shown(tmp_path)
    assert before[:5] == [(step, step) for step in range(1, 6)] and len(before) == (5 if torn else 6)
    board(3, {4: 40})
    assert shown(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 40)]


def shown(folder: Path) -> list[tuple[int, float]]:
    """Step and value of the points of the one curve `mark`, as TensorBoard reads them."""
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    (curve,) = [tag for tag in read.Tags()["scalars"] if "mark" in tag]
    return [(point.step, point.value) for point in read.Scalars(curve)]
