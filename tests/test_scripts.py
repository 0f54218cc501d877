"""Scripts that measure something follow the package that they measure."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted(
    path for folder in ("benchmarks", "experiments", "tools") for path in REPOSITORY.glob(f"{folder}/*.py")
)


def loaded(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path: Path) -> None:
    module = loaded(path)
    assert callable(module.main) and module.__doc__


def test_a_step_of_every_setting_of_the_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded(REPOSITORY / "experiments" / "routing_collapse.py")
    monkeypatch.setattr(module, "STEPS", 1)
    for setting in module.SETTINGS:
        trace = module.train(setting, 0)
        assert len(trace.load) == 1 and max(trace.load[0]) > module.BOUND, setting.name  # it begins collapsed
