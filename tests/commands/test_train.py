"""One call of `mmoe train` after another: what it resumes from, what it refuses, and what the disk may refuse."""

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.commands import session
from mmoe.commands.main import app
from mmoe.commands.report import report
from mmoe.config.load import dump, load
from mmoe.errors import CheckpointError, ConfigError, DataError, DivergenceError, OutputError
from mmoe.monitoring.sinks.tensorboard import TensorboardConfig
from mmoe.recipe.config import RunConfig
from mmoe.runtime.provenance import read_provenance
from mmoe.schema.manifest import SourceManifest
from mmoe.training.loop import Trainer
from mmoe.training.run import Run, read_config
from tests.data.synthetic import fit_codec, text_sample, write_source, write_sources
from tests.training.test_trainer import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("session")
    write_sources(root)
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of two checkpoints (steps 2 and 4) and no more, to be copied."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(configured(folder, run))
    return run


def configured(folder, run, **changes) -> RunConfig:
    changes = {"model__moe": None, "checkpoint__every_steps": 2, **changes}
    return config(folder, run, **changes)


def train(configuration: RunConfig, stop_after: int | None = 4, **options) -> str:
    """What is printed."""
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"), width=400)
    options = {"fresh": False, "from_step": None, **options}
    session.train(configuration, console, stop_after=stop_after, **options)
    return console.export_text()


@pytest.fixture
def run(trained, folder, tmp_path):
    """(config, folder) of a copy of `trained` that says that it is trained where it lies."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    configuration = configured(folder, copy)
    (copy / "config.yaml").write_text(dump(configuration))
    return configuration, copy


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_from_step_goes_back_and_is_refused_where_there_is_no_such_checkpoint(run, folder, tmp_path):
    configuration, place = run
    with pytest.raises(ConfigError, match="no checkpoint of step 3; choose from 2, 4"):
        train(configuration, from_step=3)
    with pytest.raises(ConfigError, match="--fresh deletes the checkpoints that --from-step resumes from"):
        train(configuration, fresh=True, from_step=2)
    with pytest.raises(ConfigError, match="no checkpoint of step 2; it holds none"):
        train(configured(folder, tmp_path / "new"), from_step=2)
    assert "at step 2" in train(configuration, stop_after=3, from_step=2)
    assert checkpoints(place) == ["step-00000002", "step-00000003", "step-00000004.left"]
    assert "at step 3" in train(configuration, stop_after=3)


def test_a_diverged_run_goes_on_at_a_lower_rate_by_the_command_that_it_names(run, monkeypatch):
    configuration, place = run
    step = Trainer.train_step

    def diverging(trainer, *arguments):
        if trainer.state.step == 5 and trainer.run.config.optim.lr.peak == configuration.optim.lr.peak:
            with torch.no_grad():
                trainer.state.model.decoder.norm.weight.fill_(float("nan"))
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "train_step", diverging)
    with pytest.raises(DivergenceError, match="the gradient norm of step 6 is nan") as caught:
        train(configuration, stop_after=8)
    command = shlex.split(re.search("`mmoe (train [^`]*)`", str(caught.value))[1])
    with pytest.raises(DivergenceError, match="step 6 is nan"):  # at the same rate the same comes again
        CliRunner().invoke(app, command[:2], catch_exceptions=False)
    done = CliRunner().invoke(app, [*command, "--stop-after", "8"], catch_exceptions=False)
    assert done.exit_code == 0 and steps(place) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_config(place).optim.lr.peak == configuration.optim.lr.peak / 2
    assert np.isfinite([json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()]).all()


def test_a_damaged_newest_checkpoint_is_passed_over_and_set_aside(run, caplog):
    configuration, place = run
    (place / "checkpoints/step-00000004/state.json").write_text("")
    assert "at step 2" in train(configuration, stop_after=3)
    assert "step-00000004/state.json is truncated" in caplog.text
    assert checkpoints(place) == ["step-00000002", "step-00000003", "step-00000004.left"]
    for path in (place / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of .* is whole to resume from"):
        train(configuration)
    assert steps(place) == [1, 2, 3]  # the undone lines are beside it


def test_a_damaged_config_is_told_with_the_copy_that_a_checkpoint_has(run):
    configuration, place = run
    for damage in ("", "data: [", None):
        (place / "config.yaml").write_text(damage) if damage is not None else (place / "config.yaml").unlink()
        for use in (lambda: train(configuration), lambda: Run.load(place)):
            with pytest.raises(ConfigError, match="restore it by: cp .*step-00000004/config.yaml") as error:
                use()
        source, target = str(error.value).rsplit("cp ", 1)[1].split()
        shutil.copy(source, target)
        assert read_config(place).model.d_model == configuration.model.d_model
        (place / "config.yaml").write_text(dump(configuration))


def test_a_config_is_written_only_when_it_says_something_else_and_never_in_part(run, monkeypatch):
    configuration, place = run
    before = (place / "config.yaml").stat()
    train(configuration)
    assert (place / "config.yaml").stat().st_ino == before.st_ino
    text = (place / "config.yaml").read_text()
    changed = Run.build(configuration.model_copy(update={"parallel": configuration.parallel.model_copy()}))
    object.__setattr__(changed.config.parallel, "threads", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="config.yaml cannot be written .No space left"):
            changed.save_config()
    assert (place / "config.yaml").read_text() == text
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    changed.save_config()
    assert load(RunConfig, place / "config.yaml").parallel.threads == 1


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------------------- other data


@pytest.fixture
def other(run, folder, tmp_path):
    """(config, run, data) of a run whose data was moved to a folder of its own, where it may be changed."""
    _configuration, place = run
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    moved = configured(data, place)
    (place / "config.yaml").write_text(dump(moved))
    return moved, place, data


def test_a_folder_that_moved_with_the_same_content_goes_on(other):
    configuration, _place, _ = other
    assert "at step 4" in train(configuration, stop_after=5)


def test_a_source_that_was_prepared_anew_is_named(other):
    configuration, place, data = other
    shutil.rmtree(data / "text")
    rng = np.random.default_rng(99)
    samples = {s: [text_sample(rng, f"text-{s[0]}{i}") for i in range(n)] for s, n in (("train", 24), ("heldout", 6))}
    write_source(data / "text", samples)
    with pytest.raises(CheckpointError, match="finds now: source text differs in train samples") as error:
        train(configuration)
    assert "heldout samples (6 in 1 shards" in str(error.value) and "set another training.run" in str(error.value)
    assert checkpoints(place) == ["step-00000002", "step-00000004"]
    Run.load(place)  # what was learned is what it was: it may be looked at on other recordings


def test_another_codec_is_named_by_training_and_by_what_reads_a_run(other):
    configuration, place, data = other
    fit_codec(data / "codec.safetensors", seed=1)
    for use in (lambda: train(configuration), lambda: Run.load(place)):
        with pytest.raises(CheckpointError, match="tokenizers.audio differs in fingerprint"):
            use()


def test_other_statistics_of_actions_are_named_by_training_and_by_what_reads_a_run(other):
    configuration, place, data = other
    manifest = SourceManifest.load(data / "clip")
    wider = manifest.vectors["ACTION"].model_copy(update={"std": (2.0, 2.0)})
    manifest.model_copy(update={"vectors": manifest.vectors | {"ACTION": wider}}).save(data / "clip")
    for use in (lambda: train(configuration), lambda: Run.load(place)):
        with pytest.raises(CheckpointError, match="tokenizers.action differs in statistics"):
            use()


def test_shards_that_changed_places_are_found_when_they_are_read(other):
    configuration, _, data = other
    for suffix in ("tar", "parquet"):
        first, second = (data / f"text/train/shard-00000{n}.{suffix}" for n in (0, 1))
        first.rename(data / "aside")
        second.rename(first)
        (data / "aside").rename(second)
    with pytest.raises(DataError, match="shard-00000.*parquet is not the index that source.json names.*changed places"):
        train(configuration, stop_after=5)


# ---------------------------------------------------------------------------- what the disk refuses


def test_records_that_the_disk_refuses_end_the_run_saved_and_are_written_when_it_goes_on(folder, tmp_path, monkeypatch):
    whole, place = configured(folder, tmp_path / "whole"), tmp_path / "run"
    train(whole)
    configuration = configured(folder, place)
    write, refusing = os.write, [True]

    def refuse(descriptor: int, data) -> int:
        if refusing[0] and bytes(data).startswith(b'{"step": 2,'):
            write(descriptor, bytes(data)[:40])  # a part of it, as a full disk does
            full()
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OutputError, match="metrics.jsonl cannot be written .No space.*kept in the checkpoint"):
        train(configuration)
    assert steps(place) == [1] and checkpoints(place) == ["step-00000002", "step-00000003"]
    refusing[0] = False
    train(configuration)
    assert steps(place) == steps(tmp_path / "whole") == [1, 2, 3, 4]


def test_metrics_on_a_full_device_and_in_the_way_of_a_folder_are_one_sentence(run):
    configuration, place = run
    (place / "metrics.jsonl").unlink()
    (place / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="metrics.jsonl cannot be written .No space"):
        train(configuration, stop_after=6)
    assert "step-00000006" in checkpoints(place)[-1] or "step-00000005" in checkpoints(place)[-1]
    (place / "metrics.jsonl").unlink()
    (place / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match="metrics.jsonl cannot be written .Is a directory"):
        train(configuration, stop_after=8)


def test_a_record_that_a_kill_tore_is_cut_off_when_the_run_goes_on(run):
    configuration, place = run
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(configuration, stop_after=6)
    assert steps(place) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_in_the_way_of_a_file_is_one_sentence(run):
    configuration, place = run
    (place / "tensorboard").touch()
    with_board = configuration.monitoring.model_copy(update={"sinks": (TensorboardConfig(),)})
    with_board = configuration.model_copy(update={"monitoring": with_board})
    (place / "config.yaml").write_text(dump(with_board))
    with pytest.raises(OutputError, match="tensorboard cannot be written"):
        train(with_board, stop_after=5)


def test_a_start_over_trains_from_the_first_step_and_one_in_a_folder_of_other_things_deletes_nothing(run):
    configuration, place = run
    (place / "notes.txt").touch()
    with pytest.raises(ConfigError, match="what no run writes .notes.txt."):
        train(configuration, fresh=True)
    assert checkpoints(place) == ["step-00000002", "step-00000004"]
    (place / "notes.txt").unlink()
    train(configuration, stop_after=2, fresh=True)
    assert checkpoints(place) == ["step-00000002"] and steps(place) == [1, 2]
    assert not (place / "lock").exists()


def test_what_changes_no_number_may_change_and_is_said_and_what_may_is_refused(run, folder, tmp_path):
    _, place = run
    moved, data = tmp_path / "moved", tmp_path / "elsewhere"
    place.rename(moved)
    shutil.copytree(folder, data)
    said = train(configured(data, moved, checkpoint__keep=1, data__prefetch=2, data__error_budget=0.5), stop_after=5)
    for change in ("checkpoint.keep (3 -> 1)", "data.prefetch (4 -> 2)", "data.sources.text.shards"):
        assert change in said
    assert checkpoints(moved) == ["step-00000005"]
    assert read_config(moved).checkpoint.keep == 1
    with pytest.raises(ConfigError, match="differs .* in data.window_documents .40 -> 41.; data decides .*; undo"):
        train(configured(data, moved, data__window_documents=41))


def test_a_state_that_is_no_training_is_one_sentence(run):
    configuration, place = run
    trainer = Trainer(Run.build(configuration), [])
    state = trainer._sections()
    manager = CheckpointManager(place / "checkpoints", configuration.checkpoint)
    state["trainer"] = {"step": 9, "data": trainer.state.data}
    manager.save(9, state)
    with pytest.raises(CheckpointError, match="state of step 9 is not that of a training .KeyError.*--from-step"):
        trainer.resume()
    assert checkpoints(place)[-1] == "step-00000009"


def test_a_report_reads_no_weights_counts_the_parameters_and_says_where_the_numbers_come_from(run, monkeypatch):
    """Every file of tensors is gone; what is counted is what a model in memory has."""
    configuration, place = run
    train(configuration, stop_after=5)
    count = sum(parameter.numel() for parameter in Run.build(configuration).model.parameters())
    lines, _ = read_provenance(place)
    assert [(line["session"], line["step"]) for line in lines] == [(0, 0), (1, 4)]
    assert {name for name in lines[1]["data"] if name.startswith("source ")} == {
        f"source {name}" for name in configuration.data.sources
    }
    for path in (place / "checkpoints").glob("*/*.distcp"):
        path.unlink()
    with (place / "provenance.jsonl").open("a") as file:
        file.write('{"time": ')
    report(place, None)
    page = (place / "report.html").read_text()
    assert f"{count:,} parameters" in page and "<h2>Sessions</h2>" in page and lines[1]["time"] in page
    assert "line 3 is no record of a session" in page
    fit_codec(Path(configuration.tokenizers.audio.path), seed=1)
    with pytest.raises(CheckpointError, match="tokenizers.audio differs in fingerprint"):
        report(place, None)


def test_off_a_terminal_every_record_is_a_line_with_its_figures(folder, tmp_path):
    """Four steps with a record after every second: the figures are those of the two steps before it."""
    every = train(configured(folder, tmp_path / "every", monitoring__log_every_steps=1))
    printed = train(
        configured(folder, tmp_path / "second", monitoring__log_every_steps=2, monitoring__tables_every_steps=4)
    )
    each, second = ([line for line in text.splitlines() if line.startswith("step ")] for text in (every, printed))
    assert len(each) == 4 and [line.split("  ")[0].partition("/")[0] for line in second] == ["step 2", "step 4"]
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("every", "second")
    }
    for line, record, two in zip(second, records["second"], (records["every"][:2], records["every"][2:]), strict=True):
        assert record["loss"] == pytest.approx(np.mean([step["loss"] for step in two]), rel=1e-6)
        assert record["loss_ce"] == pytest.approx(np.mean([step["loss_ce"] for step in two]), rel=1e-6)
        assert record["grad_norm"] == two[-1]["grad_norm"]
        parts = line.split("  ")
        assert parts[1].startswith(f"loss {record['loss']:.3f} (ce {record['loss_ce']:.3f}, ")
        assert parts[2:4] == [f"lr {record['lr']:.3g}", f"grad norm {record['grad_norm']:.3g}"]
        assert parts[4] == f"{record['tokens_per_second']:,.0f} tokens/s" and parts[5].endswith(" GiB")
    assert second[-1].endswith("  0:00:00 left") and re.search(r"  \d+:\d\d:\d\d left$", second[0])
