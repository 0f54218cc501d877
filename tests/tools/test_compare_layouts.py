"""The command on the demo's data, made small: what it prints, what it refuses, and that it notices a fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmoe.errors import ConfigError
from tests.conftest import REPOSITORY, load_script

TOOL = REPOSITORY / "tools" / "compare_layouts.py"
SMALL = [
    "data.sources.drive.options.recordings=8",
    "model.n_layers=2",
    "model.d_model=32",
    "model.intermediate_size=64",
    "model.moe.intermediate_size=32",
    "model.moe.router_noise=0.1",
    "losses.load_balance.micro_batch=0.1",
    "training.micro_batch_sequences=2",
]


def call(folder: Path, *arguments: str, script: Path = TOOL) -> tuple[subprocess.CompletedProcess, dict]:
    data = [f"data.sources.drive.shards={folder}/drive", f"tokenizers.text.path={folder}/text.json"]
    data += [f"tokenizers.audio.path={folder}/drive/audio_codec.safetensors", f"training.run={folder}/run"]
    command = [sys.executable, str(script), str(REPOSITORY / "configs" / "demo.yaml"), *SMALL, *data, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    head, _, result = done.stdout.rstrip().rpartition("\n")[2].partition(" ")
    return done, json.loads(result) if head == "RESULT" else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.slow
def test_layouts_agree_and_one_that_cannot_be_is_named(folder: Path) -> None:
    done, result = call(folder, "--layouts", "hsdp2", "ep2,tp2", "tp3", "--precision", "float64")
    assert result["targets"]["hsdp2"]["ok"] and result["targets"]["ep2,tp2"]["ok"], done.stdout + done.stderr
    assert result["figures"]["precision"] == "float64" and result["targets"]["hsdp2"]["target"] == 1e-11
    families = result["figures"]["layouts"]["ep2,tp2"]["gradients"]
    assert "decoder.blocks.feed_forward.experts.up" in families and "embeddings.token.weight" in families
    assert result["figures"]["layouts"]["hsdp2"]["moved_choices"] == 0
    assert list(result["figures"]["not_compared"]) == ["tp3"]
    assert "tp3 refused model.n_heads is 4, not a multiple of parallel.tp 3" in done.stdout
    assert "losses.load_balance.micro_batch is set to 0" in done.stdout
    assert "1 of 1" in done.stdout  # the micro-batch of two sequences is cut for two replicas
    assert done.returncode == 1 and not (folder / "run").exists()


FAULT = """
import mmoe.parallel.ranks
{fault}
exec(compile(open({tool!r}).read(), {tool!r}, "exec"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "layout", "verdict"),
    [
        ("mmoe.parallel.ranks.sum_over_tensor_ranks = lambda model, mesh: None", "tp2", "differs"),
        ("mmoe.parallel.ranks.sum_report = None", "dp2", "failed"),
    ],
)
def test_a_fault_is_noticed(folder: Path, tmp_path: Path, fault: str, layout: str, verdict: str) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULT.format(fault=fault, tool=str(TOOL)))
    done, result = call(folder, "--layouts", layout, script=script)
    assert done.returncode == 1 and verdict in done.stdout, done.stdout + done.stderr
    assert (layout in result["figures"]["not_compared"]) == (verdict == "failed")


CHILDLESS = """
import multiprocessing
import mmoe.preparation.ensure_prepared as ready
prepare = ready.prepare
def checked(*arguments, **options):
    assert not multiprocessing.current_process().daemon, "prepared by a process that may have no children"
    prepare(*arguments, **options)
ready.prepare = checked
"""


@pytest.mark.slow
def test_data_that_is_not_there_is_prepared_where_processes_may_be_started(tmp_path: Path) -> None:
    """Which a large source does, and the few recordings here do not."""
    script = tmp_path / "checked.py"
    script.write_text(FAULT.format(fault=CHILDLESS, tool=str(TOOL)))
    done, result = call(tmp_path, "--layouts", "dp2", script=script)
    assert done.returncode == 0 and result["targets"]["dp2"]["ok"], done.stdout + done.stderr
    assert "preparing source drive" in " ".join(done.stdout.split())


def test_names_of_layouts_and_families() -> None:
    module = load_script(TOOL)
    assert module.read_layout("ep2,dp4,hsdp2") == {"ep": 2, "dp": 4, "hsdp": 2}
    for wrong in ("dp", "dp0", "xp2", "dp2,dp2", "dp2,", "2"):
        with pytest.raises(ConfigError, match="is not one more degree"):
            module.read_layout(wrong)
    assert module.family("decoder.blocks.11.feed_forward.experts.gate") == "decoder.blocks.feed_forward.experts.gate"
    assert module.relative(0.0, 0.0) == 0.0 and module.relative(1.0, 0.0) == float("inf")


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    done, _ = call(tmp_path, "--layouts", "both2")
    assert done.returncode == 1 and "'both2' is not one more degree" in done.stderr and "Traceback" not in done.stderr
    done, _ = call(tmp_path, "--layouts", "a=b")
    assert done.returncode == 2 and "--layouts names none" in done.stderr
