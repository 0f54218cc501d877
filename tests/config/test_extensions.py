"""Modules that a config names: imported before the rest is read, from wherever it is read again."""

import sys

import pytest

from mmoe.config.base import Config
from mmoe.config.extensions import Extensions
from mmoe.config.load import dump, load, override
from mmoe.errors import ConfigError


class Root(Config):
    """Names modules."""

    extensions: Extensions = ()
    size: int = 1


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module, or the config, in the folder `home`; the current folder is another, and imports are undone."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(away)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(name, content):
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_beside_the_config_is_imported_and_its_place_kept(write, tmp_path):
    write("mine_a.py", "print('loaded')")
    write("parts_a/extra.py", "")
    read = load(Root, write("root.yaml", "extensions: [mine_a, parts_a.extra, json]"))
    home = tmp_path / "home"
    assert read.extensions == (f"{home}/mine_a", f"{home}/parts_a.extra", "json")
    assert {"mine_a", "parts_a.extra"} <= set(sys.modules)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(read))
    assert load(Root, copy) == read == override(read, ["size=1"])


def test_a_folder_before_the_name_is_that_of_the_config(write, tmp_path):
    write("mine_b.py", "")
    (tmp_path / "home" / "configs").mkdir()
    (read,) = load(Root, write("configs/root.yaml", "extensions: [../mine_b]")).extensions
    assert read.endswith("/configs/../mine_b") and "mine_b" in sys.modules


def test_a_module_in_the_current_folder_is_found_from_any_other_later(write, tmp_path, monkeypatch):
    (tmp_path / "away" / "mine_c.py").write_text("")
    assert load(Root, write("root.yaml", "extensions: [mine_c]")).extensions == (f"{tmp_path}/away/mine_c",)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none_such", "", "'none_such' cannot be imported .ModuleNotFoundError: No module named 'none_such'.; give"),
        ("mine_d", "raise KeyError('odd')", "'mine_d' cannot be imported .KeyError: 'odd'"),
        ("mine_d", "def broken(:", "'mine_d' cannot be imported .SyntaxError"),
        ("mine_d.py", "", "'mine_d.py' names no module; give one as import does, without .py"),
        ("", "", "'' names no module"),
        ("other/mine_d", "", "'other/mine_d' is no module: other/ has no mine_d"),
        ("json", "", "'json' is hidden by .*, a module of that name; rename it"),
    ],
)
def test_a_fault_is_one_sentence_whatever_else_is_wrong(write, name, content, sentence):
    write("json.py" if name == "json" else "mine_d.py", content)
    with pytest.raises(ConfigError, match=f"^extensions: {sentence}") as refused:
        load(Root, write("root.yaml", f"extensions: ['{name}']\nsize: wrong"))
    assert "\n" not in str(refused.value)
