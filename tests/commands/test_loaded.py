"""What a training process loads: no reader, no preparation, no reporting, and none of their libraries."""

import re
import subprocess
import sys

import pytest

from tests.commands.test_cli import CONFIG
from tests.conftest import REPOSITORY

UNWANTED = r"mmoe\.(preparation|reporting|evaluation|planning)|plotly|ray|decord|datasketch|imagehash"
TRAIN = """
import sys
from mmoe.commands import session
from mmoe.commands.main import app

def loaded(run, console):
    print("LOADED", *sys.modules)
    before(run, console)

before, session._evaluate = session._evaluate, loaded
if __name__ == "__main__":
    app(["train", sys.argv[1]], standalone_mode=False)
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unwanted(modules: str) -> list[str]:
    return [name for name in modules.split() if re.fullmatch(rf"({UNWANTED})(\..*)?", name)]


def test_a_training_process_loads_no_reader_even_where_it_has_prepared_its_source(tmp_path):
    lines = [f"Line {i} of a poem about the number {i * i}, and about lines.\n\n" for i in range(400)]
    (tmp_path / "poem.txt").write_text("".join(lines))
    (tmp_path / "poem.yaml").write_text(CONFIG.format(root=tmp_path))
    said = python("-c", TRAIN, str(tmp_path / "poem.yaml"))
    assert "preparing source poem there" in said and (tmp_path / "run" / "report.html").is_file()
    (modules,) = re.findall("^LOADED (.*)$", said, re.MULTILINE)
    assert "mmoe.training.loop" in modules and not unwanted(modules)


@pytest.mark.parametrize("module", ["mmoe.training.loop", "mmoe.training.run", "mmoe.commands.session"])
def test_importing_the_training_loads_no_reader(module):
    modules = python("-c", f"import sys, {module}; print(*sys.modules)")
    assert module in modules and not unwanted(modules)


def test_a_process_that_makes_chunks_loads_no_torch():
    """A preparation has one for each core: of modalities it asks by what name a payload is refused."""
    asked = "[kind.spec.refused_as for kind in Modality if kind is not Modality.STRUCTURE]"
    script = f"import sys, mmoe.preparation.chunks\nfrom mmoe.schema.modality import Modality\n{asked}"
    modules = python("-c", f"{script}\nprint(*sys.modules)").split()
    assert "mmoe.modalities.vision" in modules and "torch" not in modules


def test_what_a_training_must_not_load_is_recognized():
    assert unwanted("mmoe.training.run mmoe.reporting ray ray.util rays mmoe.preparation.sources.text plotly.io") == [
        "mmoe.reporting",
        "ray",
        "ray.util",
        "mmoe.preparation.sources.text",
        "plotly.io",
    ]
