"""The command line as a user meets it: commands end to end on small text, and errors of one sentence."""

import errno
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mmoe import __version__
from mmoe.commands import main as cli
from mmoe.errors import ConfigError, DataError, MmoeError, PackageError
from mmoe.optional import require
from tests.conftest import REPOSITORY

CONFIG = """
data:
  sources: {{poem: {{kind: text, input: {root}/poem.txt, shards: {root}/poem}}}}
  sequence_length: 128
  window_documents: 16
model: {{d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, intermediate_size: 32}}
losses: {{contrastive: {{weight: 0.0}}}}
optim: {{lr: {{peak: 3e-3}}}}
training:
  run: {root}/run
  micro_batch_sequences: 2
  global_batch_positions: 256
  budget_positions: 1536
"""


def mmoe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mmoe", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"Line {i} of a poem about the number {i * i}, and about lines.\n\n" for i in range(400)]
    (folder / "poem.txt").write_text("".join(lines))
    (folder / "poem.yaml").write_text(CONFIG.format(root=folder))
    return folder


def test_train_prepares_what_is_missing_evaluates_and_reports(root):
    done = mmoe("train", str(root / "poem.yaml"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["val_ce"]["text"] > 0 and summary["unigram_ce"]["text"] > 0
    page = (root / "run" / "report.html").read_text()
    assert "Plotly" in page and '<script src="http' not in page and "<link" not in page.split("</head>")[0]
    assert f"{root}/poem does not exist: preparing source poem there, from text in {root}/poem.txt" in done.stdout
    assert "prepared text" in done.stdout and "going on" not in done.stdout
    again = mmoe("train", str(root / "poem.yaml"))
    assert again.returncode == 0 and "has its 6 steps already" in " ".join(again.stdout.split())
    text = mmoe("generate", str(root / "run"), "--prompt", "Line", "--max-tokens", "8")
    assert text.returncode == 0 and text.stdout.startswith("Line")


@pytest.mark.parametrize(
    "arguments, sentence, code",
    [
        (["train", "configs/demo.yaml", "optim.lr.peek=1"], "did you mean optim.lr.peak?", 2),
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist", 2),
        (["train", "configs/demo.yaml", "parallel.offload=true"], "parallel.offload is true, which is FSDP's work", 2),
        (["prepare", "txt", "a", "b"], "did you mean text?", 2),
        (["evaluate", "nowhere"], "nowhere is not a run; train it first", 2),
        (["evaluate", "nowhere", "--blank", "sight"], "'sight' is not a modality; choose from", 2),
    ],
)
def test_a_fault_is_one_sentence_and_no_traceback(arguments, sentence, code):
    done = mmoe(*arguments)
    assert done.returncode == code and sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "raised, status, sentence",
    [
        (OSError(errno.ENOSPC, "x", "runs/a"), 1, "error runs/a: No space left on device; make room"),
        (OSError(errno.ENOSPC, "x"), 1, "error No space left on device; make room"),
        (OSError(errno.EROFS, "x", "a", None, "b"), 1, "error a -> b: Read-only file system; name a folder that can"),
        (OSError(errno.EACCES, "x", b"a"), 1, "Permission denied; change its rights"),
        (IsADirectoryError(errno.EISDIR, "x", "a"), 1, "error a: Is a directory; name a file"),
        (KeyboardInterrupt(), 130, "error interrupted"),
        (SystemExit(130), 130, "error interrupted"),
        (ConfigError("model.d_model is 0"), 2, "error model.d_model is 0"),
        (DataError("a\x1b[31m [/b] \udcff"), 1, "error a\\x1b[31m [/b] \\udcff"),
    ],
)
def test_what_the_machine_or_the_user_ends_is_a_sentence(monkeypatch, capsys, raised, status, sentence):
    def app():
        raise raised

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == status and sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "raised", [ValueError("x"), FileNotFoundError(errno.ENOENT, "x", "a"), OSError("x"), KeyError("k")]
)
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, raised):
    def app():
        raise raised

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(type(raised)):
        cli.main()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["prepare", "text", "", "b"], "the input is empty, which names no folder"),
        (["train", "configs"], "configs is a folder; give a YAML file in it, or the folder of a run"),
        (["stages", "/dev/zero"], "/dev/zero is a pipe or a device"),
        (["inspect", "configs/demo.yaml", "data.sources.drive.shards=nowhere"], "nowhere does not exist"),
        (["stages", "configs/demo.yaml", "a..b=1"], "override 'a..b=1' is not of the form key.path=value"),
    ],
)
def test_what_is_no_config_and_no_folder_is_named(monkeypatch, arguments, sentence):
    monkeypatch.chdir(REPOSITORY)
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, MmoeError) and sentence in str(done.exception)


def test_a_package_that_a_config_asks_for_is_a_fault_of_the_config():
    with pytest.raises(PackageError) as error:
        require("nothing", "model.attention")
    assert error.value.exit_code == ConfigError.exit_code == 2


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.exit_code == 0 and done.output == f"{__version__}\n"


@pytest.mark.parametrize("option", ["--dry-run", "--world-size=8"])
def test_train_takes_no_option_of_a_dry_run(option):
    done = CliRunner().invoke(cli.app, ["train", "configs/demo.yaml", option])
    assert done.exit_code == 2 and "No such option" in done.output


def test_the_help_is_shown_without_what_is_slow_to_load():
    work = "import sys; from mmoe.commands.main import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", work], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "pyarrow", "yaml"} & set(loaded.stdout.split())


def test_a_full_disk_and_a_closed_pipe_end_a_command_without_a_traceback():
    work = (
        "from mmoe.commands import main as cli; "
        "cli.app = lambda: [cli.console.print('x' * 70) for _ in range(1000)]; cli.main()"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", work], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == "error No space left on device; make room, or name another folder\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", work], cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 1 and not done.stderr
