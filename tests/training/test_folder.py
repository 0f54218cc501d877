"""`--fresh` deletes a run, and nothing that is not one."""

from pathlib import Path

import pytest

from mmoe.errors import ConfigError
from mmoe.training.folder import check_start_over, start_over

CONFIG = "model: {}\ntraining: {run: x}\n"


def run_in(folder: Path) -> Path:
    """A folder with every name that a run writes."""
    files = [
        "metrics.jsonl",
        "metrics-undone.jsonl",
        "tracked-wandb.json",
        "quarantine.jsonl",
        "errors.jsonl",
        "lock",
        "summary.json",
        "report.html",
        "baselines.npz",
    ]
    files += ["hang-report.txt", "hang-report-20260101-101112.txt", "hang-report-rank-00001.txt", "hang-report.partial"]
    files += ["baselines.npz", "evaluation.json", "evaluation-blank-vision.json", f".evaluation.json.{'0a' * 16}"]
    files += ["checkpoints/step-00000010/state.json", "checkpoints/step-00000020.left/__0_0.distcp"]
    files += ["checkpoints/step-00000030.partial/.metadata", "checkpoints/latest", "logs/rank-00001.log"]
    files += ["tensorboard/events.out.tfevents.1.host.2.0", "checkpoints.deleted/step-00000005/state.json"]
    files += ["tables/step-000000010.parquet", f"tables/.step-000000010.parquet.{'0a' * 16}"]
    files += ["wandb/offline-run-20260101_101112-0a1b2c3d/files/config.yaml"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(folder: Path) -> str:
    before = tree(folder.resolve())
    with pytest.raises(ConfigError) as error:
        start_over(folder)
    assert tree(folder.resolve()) == before
    return str(error.value)


def test_all_that_a_run_writes_is_deleted_but_its_lock(tmp_path):
    run = run_in(tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "other").mkdir()
    start_over(run)
    assert tree(tmp_path / "runs") == {run, run / "lock", tmp_path / "runs" / "other"}


def test_a_folder_that_is_missing_or_empty_has_nothing_to_delete(tmp_path):
    start_over(tmp_path / "none")
    start_over(tmp_path)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("name", [".", "..", "../..", "/", "~", "sub/.."])
def test_the_folders_one_stands_in_or_lives_in_are_refused(tmp_path, monkeypatch, name):
    here = run_in(tmp_path / "home" / "a" / "b")
    (here / "logs").rename(here / "sub")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError, match="the working folder|the home folder") as error:
        check_start_over(Path.home() if name == "~" else Path(name))  # no more than checked: it is the real one
    assert "--fresh deletes nothing" in str(error.value)


def test_a_folder_of_runs_is_refused_by_naming_them(tmp_path):
    """`training.run=runs/$NAME` with an empty NAME."""
    for name in ("first", "second"):
        run_in(tmp_path / "runs" / name)
    assert "holds other runs (first, second)" in refused(tmp_path / "runs")
    run_in(tmp_path / "runs")  # even where it is itself one
    assert "holds other runs (first, second)" in refused(tmp_path / "runs")


STRAYS = [
    "notes.txt",
    "src/",
    "checkpoints/best.pt",
    "tensorboard/mine.txt",
    "tables/mine.parquet",
    "logs/app.log",
    "evaluation.txt",
]


@pytest.mark.parametrize("stray", STRAYS)
def test_files_that_are_not_of_a_run_are_named(tmp_path, stray):
    run = run_in(tmp_path / "run")
    (run / stray).mkdir() if stray.endswith("/") else (run / stray).touch()
    assert f"which holds what no run writes ({stray})" in refused(run)


@pytest.mark.parametrize("link", ["checkpoints", "notes", "logs/rank-00001.log", "checkpoints/step-00000010"])
def test_links_are_refused_wherever_they_lead(tmp_path, link):
    run, outside = run_in(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "step-00000010").mkdir()
    path = run / link
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(outside)
    assert link in refused(run)


def test_a_run_that_is_reached_by_a_link_is_deleted_where_it_lies(tmp_path):
    run = run_in(tmp_path / "disk" / "run")
    (tmp_path / "run").symlink_to(run)
    start_over(tmp_path / "run")
    assert tree(run) == {run / "lock"}


@pytest.mark.parametrize("content", ["name: my-service\n", "- a\n", "training: 3\n"])
def test_a_config_of_another_program_is_no_run(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "report.html").touch()
    assert "is not a run" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "a: [", CONFIG])
def test_a_run_that_failed_early_or_whose_config_a_crash_cut_off_starts_over(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    start_over(tmp_path)
    assert tree(tmp_path) == set()


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="which is a file"):
        check_start_over(tmp_path / "run")
