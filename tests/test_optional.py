"""What is asked of optional packages: present, missing, unusable here, broken, unknown."""

import importlib
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mmoe.errors import PackageError
from mmoe.optional import OPTIONAL_PACKAGES, OptionalPackage, needs, require, status

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh() -> None:
    status.cache_clear()
    yield
    status.cache_clear()


def add(monkeypatch: pytest.MonkeyPatch, backend: OptionalPackage) -> None:
    monkeypatch.setitem(OPTIONAL_PACKAGES, "sample", backend)


def test_a_present_backend_has_its_version_and_module() -> None:
    found = status("pyav")
    assert found.available and found.version == metadata.version("av") and found.reason == ""
    assert require("pyav", "data.video_backend") is importlib.import_module("av")


def test_a_missing_package_names_itself_the_key_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, OptionalPackage("nothing", "mmoe_no_such_module", "no-such-package", "-e '.[trackers]'"))
    found = status("sample")
    reason = "not available because the package no-such-package is not installed: pip install -e '.[trackers]'"
    assert not found.available and found.version == "" and found.reason == reason
    with pytest.raises(PackageError) as error:
        require("sample", "monitoring.sample")
    assert str(error.value).startswith(f"monitoring.sample asks for sample, {reason}")


def test_an_import_that_fails_for_a_missing_package_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, OptionalPackage("nothing", "mmoe_no_such_module", "no-such-package", "-e '.[media]'"))
    sentence = "decoding video: the package no-such-package is not installed: pip install -e '.[media]'"
    with pytest.raises(PackageError, match=f"^{re.escape(sentence)}$"), needs("decoding video"):
        importlib.import_module("mmoe_no_such_module.part")
    with pytest.raises(ModuleNotFoundError, match="mmoe_other_module"), needs("decoding video"):  # not one of ours
        importlib.import_module("mmoe_other_module")


@pytest.mark.parametrize("failure", ["raise OSError('libcudart.so.12: cannot open')", "raise SystemError"])
def test_a_broken_package_is_not_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str) -> None:
    (tmp_path / "mmoe_broken_module.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    add(monkeypatch, OptionalPackage("nothing", "mmoe_broken_module", "broken", "broken"))
    expected = "libcudart.so.12: cannot open" if "OSError" in failure else "SystemError"
    assert f"not available because importing mmoe_broken_module fails ({expected})" in status("sample").reason


def test_what_the_machine_lacks_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = status("cuda")
    assert not found.available and "CUDA" in found.reason and found.version
    monkeypatch.setattr(torch.version, "cuda", None)
    status.cache_clear()
    assert "is built without CUDA" in status("cuda").reason


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(PackageError, match="^data.video_backend: 'decrod' is not a backend; did you mean decord?"):
        require("decrod", "data.video_backend")
    with pytest.raises(PackageError, match="did you mean transformer-engine"):
        status("transformer_engine")


def test_answers_are_lazy_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mmoe_lazy_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    add(monkeypatch, OptionalPackage("nothing", "mmoe_lazy_module", "lazy", "lazy"))
    asked, find_spec = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or find_spec(name))
    assert "mmoe_lazy_module" not in sys.modules
    assert status("sample") is status("sample") and asked == ["mmoe_lazy_module"]
    assert sys.modules.pop("mmoe_lazy_module")


def test_every_extra_that_is_advised_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, backend in OPTIONAL_PACKAGES.items():
        assert backend.module and backend.purpose, name
        if backend.install.startswith("-e"):
            extra = backend.install.split("[")[1].split("]")[0]
            packages = re.search(rf"^{extra} = \[(.*?)\]\n", text, re.DOTALL | re.MULTILINE)[1]
            assert f'"{backend.distribution}' in packages, name


@pytest.mark.parametrize("name", OPTIONAL_PACKAGES)
def test_every_backend_answers(name: str) -> None:
    found = status(name)
    assert found.available == (found.reason == "")
    assert found.available or found.reason.startswith("not available because ")


MEDIA = (
    "av",
    "PIL",
    "soundfile",
    "torchaudio",
    "decord",
    "plotly",
    "tensorboard",
    "wandb",
    "psutil",
    "ray",
    "transformers",
)


def test_training_and_preparing_text_load_no_optional_package() -> None:
    modules = (
        "mmoe.commands.main, mmoe.commands.train, mmoe.evaluation.evaluate, mmoe.evaluation.generate, "
        "mmoe.preparation.prepare"
    )
    code = f"""
import sys, {modules}
from mmoe.preparation.sources import SOURCES
from mmoe.tokenizers.audio import AudioConfig
SOURCES.find("text"), AudioConfig()
print(*sorted({set(MEDIA)} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
