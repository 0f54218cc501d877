"""The command line as a user meets it: commands end to end on small text, and errors of one sentence."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

CONFIG = """
data:
  sources: {{poem: {{kind: text, input: {root}/poem.txt, shards: {root}/poem}}}}
  sequence_length: 128
  window_documents: 16
model: {{d_model: 16, layers: 1, heads: 2, kv_heads: 1, hidden: 32}}
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
    again = mmoe("train", str(root / "poem.yaml"))
    assert again.returncode == 0 and "has its 6 steps already" in " ".join(again.stdout.split())
    text = mmoe("generate", str(root / "run"), "--prompt", "Line", "--max-tokens", "8")
    assert text.returncode == 0 and text.stdout.startswith("Line")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train", "configs/demo.yaml", "optim.lr.peek=1"], "did you mean optim.lr.peak?"),
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "configs/demo.yaml", "parallel.offload=true"], "parallel.offload is true, which is FSDP's work"),
        (["train", "configs/demo.yaml", "--world-size", "8"], "--world-size is for --dry-run, which was not given"),
        (["train", "configs/demo.yaml", "--dry-run", "--fresh"], "--fresh is for training, not for --dry-run"),
        (["prepare", "txt", "a", "b"], "did you mean text?"),
        (["evaluate", "nowhere"], "nowhere is not a run; train it first"),
        (["evaluate", "nowhere", "--blank", "sight"], "'sight' is not a modality; choose from"),
    ],
)
def test_a_fault_is_one_sentence_and_no_traceback(arguments, sentence):
    done = mmoe(*arguments)
    assert done.returncode == 1 and sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
