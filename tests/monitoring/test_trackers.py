"""Trackers: a run that goes on is the same run there, what was undone does not stay in it, and boards group alike."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmoe.errors import DataError, PackageError
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.boards import chart_groups, tag
from mmoe.monitoring.sinks.tracked import TrackedRun
from mmoe.monitoring.sinks.trackio import TrackioConfig
from mmoe.monitoring.sinks.wandb import WandbConfig, WandbSink
from mmoe.optional import OPTIONAL_PACKAGES, OptionalPackage, status
from mmoe.recipe.monitoring import SinkContext
from tests.conftest import REPOSITORY


def record(step: int) -> StepRecord:
    load = np.arange(8).reshape(1, 2, 2, 2) + step
    return StepRecord(step, 0, {"loss": 1 / step, "mfu": 0.4}, {"expert_load": load}, {"stage": "hot"})


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "loss/loss"),
        ("loss_ce", "loss/loss_ce"),
        ("ce_from_drive", "loss/ce_from_drive"),
        ("contrastive_accuracy", "loss/contrastive_accuracy"),
        ("lr", "optim/lr"),
        ("tokens", "data/tokens"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("planned_positions/drive", "data/planned_positions/drive"),
        ("lost/drive/cut at a slice", "data/lost/drive/cut at a slice"),
        ("drop_rate", "routing/drop_rate"),
        ("eval/val_ce", "eval/val_ce"),
        ("lrx", "other/lrx"),
    ],
)
def test_scalars_are_grouped(name, shown):
    assert tag(name) == shown


def test_tables_by_expert_are_curves_summed_over_what_is_between_layer_and_expert():
    points = dict(chart_groups(record(1)))
    assert points["routing/expert_load/layer0/expert0"] == 1 + 3 + 5 + 7
    assert points["routing/expert_load/layer0/expert1"] == 2 + 4 + 6 + 8
    assert points["loss/loss"] == 1.0 and "routing/expert_load/layer1/expert0" not in points


class FakeWandb:
    """The calls that the sink makes of wandb, as its reference documents them."""

    class Error(Exception):
        pass

    def __init__(self, truncates: bool = True) -> None:
        self.truncates, self.started, self.logged = truncates, [], []

    def Settings(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def init(self, **given: Any) -> SimpleNamespace:
        if "resume_from" in given and not self.truncates:
            raise self.Error("resume_from is not enabled")
        self.started.append({k: v for k, v in given.items() if k in ("id", "resume", "resume_from", "group", "mode")})
        return SimpleNamespace(
            log=lambda points, step: self.logged.append((len(self.started), step)), finish=lambda: None
        )


def session(folder: Path, wandb: FakeWandb, begin: int, end: int, killed: bool = False, **config: Any) -> None:
    sink = WandbSink(wandb, WandbConfig(project="p", **config), SinkContext(folder, {"a": 1}))
    sink.rewind(begin)
    for step in range(begin + 1, end + 1):
        sink.write(record(step))
    if not killed:
        sink.close()


def test_a_run_that_was_closed_goes_on_as_the_same_run(tmp_path):
    wandb = FakeWandb()
    session(tmp_path, wandb, 0, 3)
    session(tmp_path, wandb, 3, 5)
    first, second = wandb.started
    assert second == first | {"resume": "allow"} and len(first["id"]) == 8


@pytest.mark.parametrize(("begin", "killed"), [(2, False), (2, True), (3, True)])
def test_what_was_undone_or_may_be_is_cut_off_there(tmp_path, begin, killed):
    wandb = FakeWandb()
    session(tmp_path, wandb, 0, 3, killed=killed)
    session(tmp_path, wandb, begin, 5)
    session(tmp_path, wandb, 5, 6)
    run = wandb.started[0]["id"]
    assert wandb.started[1]["resume_from"] == f"{run}?_step={begin}" and wandb.started[2]["id"] == run


@pytest.mark.parametrize("how", ["offline", "refused", "from the begin"])
def test_where_nothing_can_be_cut_off_it_goes_on_as_another_run_of_the_group(tmp_path, how, caplog):
    wandb = FakeWandb(truncates=how != "refused")
    mode = "offline" if how == "offline" else "online"
    session(tmp_path, wandb, 0, 3, mode=mode)
    session(tmp_path, wandb, 0 if how == "from the begin" else 2, 5, mode=mode)
    first, second = wandb.started
    assert second["id"] != first["id"] and second["group"] == first["group"] == tmp_path.name
    assert "resume" not in second
    assert ("goes on there as a new one" in caplog.text) == (how == "refused")


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    for name, config in (("wandb", WandbConfig(project="p")), ("trackio", TrackioConfig(project="p"))):
        status.cache_clear()
        monkeypatch.setitem(
            OPTIONAL_PACKAGES, name, OptionalPackage("scalar logs", "mmoe_no_such_module", name, "-e '.[trackers]'")
        )
        with pytest.raises(PackageError, match=rf"monitoring.sinks asks for {name}.*pip install -e '.\[trackers\]'"):
            config.build(SinkContext(tmp_path, {}))
    status.cache_clear()


def test_a_file_that_names_no_run_is_named(tmp_path):
    (tmp_path / "tracked-wandb.json").write_text("[]")
    with pytest.raises(DataError, match=r"tracked-wandb.json names no run of a tracker.*delete it"):
        TrackedRun.read(tmp_path / "tracked-wandb.json")


def entries(path: Path) -> Iterator[bytes]:
    """The records of wandb's file: after 7 bytes a log of LevelDB, whose pieces do not cross blocks of 32 KiB."""
    content, place, held = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        held, place = held + content[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def test_wandb_offline_has_each_point_at_its_step_and_the_same_id_in_the_next_session(tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for begin, end in ((0, 3), (3, 5)):
        sink = WandbConfig(project="p", mode="offline").build(SinkContext(tmp_path, {"a": {"b": 1}}))
        sink.rewind(begin)
        for step in range(begin + 1, end + 1):
            sink.write(record(step))
        sink.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.stem for path in files}) == 1
    assert not any(path.is_symlink() for path in (tmp_path / "wandb").iterdir())
    points = []
    for data in (data for path in files for data in entries(path)):
        entry = wandb_internal_pb2.Record.FromString(data)
        if entry.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
            points.append((items["_step"], items["loss/loss"]))
    assert points == [(step, 1 / step) for step in range(1, 6)] and wandb.run is None


TRACKIO = """
import sys
from collections.abc import Iterator
from pathlib import Path
from tests.monitoring.test_trackers import record
from mmoe.monitoring.sinks.trackio import TrackioConfig
from mmoe.recipe.monitoring import SinkContext
for begin, end in ((0, 3), (3, 5), (4, 6)):
    sink = TrackioConfig(project="p").build(SinkContext(Path(sys.argv[1]), {"a": 1}))
    sink.rewind(begin)
    for step in range(begin + 1, end + 1):
        sink.write(record(step))
    sink.close()
from trackio.sqlite_storage import SQLiteStorage
import json
runs = [r["name"] for r in SQLiteStorage.get_run_records("p")]
print(json.dumps({name: [(l["step"], l["loss/loss"]) for l in SQLiteStorage.get_logs("p", name)] for name in runs}))
"""


def test_trackio_has_each_point_at_its_step_and_another_run_where_steps_were_undone(tmp_path):
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *sys.path])
    run = tmp_path / "demo"
    run.mkdir()
    done = subprocess.run([sys.executable, "-c", TRACKIO, str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(said for said in done.stdout.splitlines() if said.startswith("{")))
    assert sorted(found.values()) == [[[n, 1 / n] for n in range(1, 6)], [[n, 1 / n] for n in (5, 6)]]
    assert all(name.startswith("demo-") for name in found)
