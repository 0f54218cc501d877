"""Whatever fails, a checkpoint is whole or it is passed over, and no older one is lost."""

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmoe.checkpoint.manifest import Manifest
from mmoe.checkpoint.reader import find_whole
from mmoe.errors import CheckpointError, ConfigError
from mmoe.runtime.agreement import ProcessGroupRanks
from tests.checkpoint.states import Crash, edges, faults, loaded, manager, sealed, state_of


@pytest.mark.parametrize("again", [10, 20])
def test_a_crash_at_any_change_to_the_disk_loses_nothing(tmp_path: Path, again: int) -> None:
    """Whatever the moment: the old checkpoint is loaded whole or the new one whole, and saving goes on."""

    def save_over(folder: Path, at: int) -> list[str]:
        checkpoints = manager(folder, keep=1)
        checkpoints.save(10, state_of(1.0))
        with pytest.MonkeyPatch.context() as patch:
            log = faults(patch, at, Crash, crash=True)
            try:
                checkpoints.save(again, state_of(2.0))
            except Crash:
                assert len(log) > at
        return log

    log, outcomes = save_over(tmp_path / "whole", 10**6), []
    assert {"fsync", "rename", "write", "mkdir", "rmtree"} == set(log)
    for at in edges(log):
        folder = tmp_path / str(at)
        save_over(folder, at)
        after = manager(folder)
        found, latest = loaded(after), after.latest_step()
        outcomes.append(found)
        after.save(30, state_of(3.0))
        assert loaded(after) == 3.0 and loaded(after, latest) == found
        assert all(p.name[5:].isdecimal() for p in after.folder.iterdir())
    assert outcomes == sorted(outcomes) and set(outcomes) == {1.0, 2.0}


def test_a_crash_half_way_through_a_deletion_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(tmp_path, keep=1)
    checkpoints.save(10, state_of(1.0))

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "manifest.json").unlink()
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shutil, "rmtree", rmtree)
        checkpoints.save(20, state_of(2.0))
    assert checkpoints.steps() == [20] and loaded(checkpoints) == 2.0


def test_a_full_disk_at_any_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints, refused = manager(tmp_path), 0
    checkpoints.save(10, state_of(1.0))
    for at in range(200):  # until none of the changes is the `at`-th
        with pytest.MonkeyPatch.context() as patch:
            log = faults(patch, at, full, crash=False)
            try:
                checkpoints.save(20, state_of(2.0))
                break
            except CheckpointError as error:
                assert "no room for a checkpoint of" in str(error) and "checkpoint.keep" in str(error)
        if log[at] == "write":
            refused += 1
            assert {p.name for p in checkpoints.folder.iterdir()} == {"step-00000010"}
            assert loaded(checkpoints) == 1.0
        assert loaded(checkpoints) in (1.0, 2.0)
    assert refused == log.count("write") > 10


def test_a_file_size_limit_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a tensor, where torch would speak of file positions."""
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0, 100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            checkpoints.save(20, state_of(2.0, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "earlier checkpoints are intact" in str(error.value)
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step-00000010"}
    assert loaded(checkpoints, size=100_000) == 1.0


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(20, state_of(2.0, 1_000_000))
    assert f"{checkpoints.folder}: no room for a checkpoint of 5,048,576 bytes (1,234 free)" in str(error.value)
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step-00000010"}


def test_ctrl_c_while_saving_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    with monkeypatch.context() as patch:
        faults(patch, 5, KeyboardInterrupt, crash=False)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(20, state_of(2.0))
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step-00000010"}
    assert loaded(checkpoints) == 1.0


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="saving a checkpoint of .* failed .*File exists"):
        manager(tmp_path).save(10, state_of(1.0))


def test_a_crash_while_going_back_resumes_where_the_run_stood_or_where_it_went(tmp_path: Path) -> None:
    def go_back(folder: Path, at: int) -> list[str]:
        checkpoints = manager(folder)
        for step in (10, 20, 30):
            checkpoints.save(step, state_of(step))
        checkpoints.go_back(10)
        for step in (20, 30):  # again, over what is set aside already
            checkpoints.save(step, state_of(step))
        with pytest.MonkeyPatch.context() as patch:
            log = faults(patch, at, Crash, crash=True)
            try:
                checkpoints.go_back(10)
            except Crash:
                assert len(log) > at
        return log

    outcomes = []
    for at in range(len(go_back(tmp_path / "whole", 10**6)) + 1):
        go_back(tmp_path / str(at), at)
        after = manager(tmp_path / str(at))
        outcomes.append(loaded(after))
        after.save(40, state_of(40))
        assert loaded(after) == 40
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {30, 10}


FILES = ["__0_0.distcp", ".metadata", "state.json", "config.yaml", "manifest.json"]
FAULTS = ["truncated", "flipped", "gone"]


def damage(path: Path, fault: str) -> None:
    content = path.read_bytes()
    if fault == "gone":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x11]) + content[middle + 1 :])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_that_was_asked_for_is_named_by_file(tmp_path: Path, name: str, fault: str) -> None:
    checkpoints = manager(tmp_path)
    checkpoints.save(5, state_of(0.5))
    damage(checkpoints.save(10, state_of(1.0), {"config.yaml": "a: 1"}) / name, fault)
    with pytest.raises(CheckpointError, match=f"{name}.*resume from an earlier checkpoint .there are 5."):
        loaded(checkpoints, 10)
    checkpoints.go_back(4)
    with pytest.raises(ConfigError, match="no checkpoint of step 10"):
        loaded(checkpoints, 10)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_newest_one_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, name: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = manager(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, state_of(step), {"config.yaml": f"step: {step}"})
    damage(checkpoints.folder / "step-00000030" / name, fault)
    assert loaded(checkpoints) == 20
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelname == "WARNING"
    assert f"step-00000030/{name}" in said and said.endswith("goes on from step-00000020 instead")
    assert checkpoints.text("config.yaml")[1] == (
        "step: 20" if name in ("config.yaml", "manifest.json") else "step: 30"
    )
    for step in (10, 20):
        damage(checkpoints.folder / f"step-000000{step}" / name, fault)
    with pytest.raises(CheckpointError, match=f"step-00000030/{name}.*2 older ones are damaged too.*--fresh"):
        loaded(checkpoints)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """The format, too: another digit there is damage, not a newer program."""
    checkpoints = manager(tmp_path)
    checkpoints.save(10, state_of(1.0))
    path = checkpoints.save(20, state_of(2.0)) / "manifest.json"
    content, passed = path.read_bytes(), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        passed += find_whole(checkpoints.folder, None, ProcessGroupRanks())[1].step == 10
    assert passed > 0.6 * len(content)  # the rest is white space
    path.write_bytes(content.replace(b'"format": 4', b'"format": 7'))
    assert loaded(checkpoints) == 1.0


def test_a_reader_finds_what_a_training_saves_while_it_deletes_what_is_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, reader = manager(tmp_path, keep=1), manager(tmp_path)
    training.save(10, state_of(10))

    def meanwhile(folder: Path) -> Manifest:
        monkeypatch.undo()
        training.save(20, state_of(20))
        return Manifest.read(folder)

    monkeypatch.setattr(Manifest, "read", meanwhile)
    assert loaded(reader) == 20


def test_a_file_that_the_disk_cannot_give_counts_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state_of(step))
    opened = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if "step-00000020" in str(path) and path.suffix == ".distcp":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    assert loaded(checkpoints) == 10


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "3",
        "[" * 20_000,
        '{"model": {"$tensor": 3}}',
        '{"model": {"$tuple": {}}}',
        '{"model": {"$integer_keys": {"x": 1}}}',
        '{"model": {"weight": {"$tensor": "model.none"}}, "trainer": {}}',
        '{"model": {"weight": {"$tensor": "model.weight", "more": 1}}, "trainer": {}}',
        '{"model": 3, "trainer": {}}',
    ],
)
def test_a_state_of_another_shape_is_one_sentence(tmp_path: Path, text: str) -> None:
    checkpoints = manager(tmp_path)
    folder = checkpoints.save(10, state_of(1.0))
    (folder / "state.json").write_text(text)
    sealed(folder)
    with pytest.raises(CheckpointError, match="step-00000010"):
        loaded(checkpoints)
