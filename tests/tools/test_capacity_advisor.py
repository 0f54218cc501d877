import json
import subprocess
import sys

from mmoe.config.load import dump, load
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY
from tests.planning.test_capacity import falling, record, write


def call(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "tools" / "capacity_advisor.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_tells_the_smallest_factors_and_ends_with_a_result(tmp_path):
    (tmp_path / "config.yaml").write_text(dump(load(RunConfig, REPOSITORY / "configs" / "demo.yaml")))
    write(tmp_path, record(10, [40_000] * 21, [40_000] * 21), record(20, falling(3), falling(5)))
    done = call(tmp_path, "--last", 0.5)
    assert done.returncode == 0, done.stderr
    assert "layer 1: 1.25" in done.stdout and "every layer: 1.25" in done.stdout and "10.000%" in done.stdout
    head, _, result = done.stdout.splitlines()[-1].partition(" ")
    figures = json.loads(result)["figures"]
    assert head == "RESULT" and figures["steps"] == [20, 20]
    assert figures["smallest"] == {"0": 1.15, "1": 1.25} and figures["smallest_everywhere"] == 1.25
    page = (tmp_path / "capacity.html").read_text()
    assert "capacity factor" in page and "<script src" not in page


def test_errors_are_one_sentence(tmp_path):
    done = call(tmp_path / "none")
    assert done.returncode == 1 and "is not a run; train it first" in done.stderr and "Traceback" not in done.stderr
    assert "must be above 0" in call(tmp_path, "--last", 0).stderr
