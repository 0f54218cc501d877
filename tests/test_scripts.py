"""Scripts that measure something follow the package that they measure."""

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, load_script

SCRIPTS = sorted(
    path for folder in ("benchmarks", "experiments", "tools") for path in REPOSITORY.glob(f"{folder}/*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path: Path) -> None:
    module = load_script(path)
    assert callable(module.main) and module.__doc__


def test_a_step_of_every_setting_of_the_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script(REPOSITORY / "experiments" / "routing_collapse.py")
    monkeypatch.setattr(module, "STEPS", 1)
    for setting in module.SETTINGS:
        trace = module.train(setting, 0)
        assert len(trace.load) == 1 and max(trace.load[0]) > module.BOUND, setting.name  # it begins collapsed
