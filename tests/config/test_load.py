"""Reading configs: parents, overrides, strictness, and the sentences a user gets."""

import pytest
from pydantic import Field, model_validator

from mmoe.config.base import Config
from mmoe.config.load import dump, load, merge, parse_overrides, read_layers
from mmoe.errors import ConfigError


class Rate(Config):
    peak: float = Field(gt=0)
    rule: str = "sqrt"


class Optim(Config):
    lr: Rate
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "Optim":
        if self.betas[0] > self.betas[1]:
            raise ValueError(f"betas {self.betas} fall; give the smaller one first")
        return self


class Tree(Config):
    optim: Optim
    steps: int = 10
    extra: Optim | None = None


def write(path, text):
    path.write_text(text)
    return path


def test_a_resolved_tree_reloads_to_an_equal_tree(tmp_path):
    tree = load(Tree, write(tmp_path / "a.yaml", "optim: {lr: {peak: 3e-4}, betas: [0.8, 0.9]}\nsteps: 7\n"))
    assert tree.optim.lr.peak == 3e-4 and tree.optim.betas == (0.8, 0.9)
    assert load(Tree, write(tmp_path / "b.yaml", dump(tree))) == tree


def test_a_child_lays_over_its_parent_key_by_key(tmp_path):
    write(tmp_path / "base.yaml", "optim: {lr: {peak: 1.0, rule: linear}}\nsteps: 3\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\noptim: {lr: {peak: 2.0}}\n")
    assert merge(*read_layers(child)) == {"optim": {"lr": {"peak": 2.0, "rule": "linear"}}, "steps": 3}


def test_a_grandparent_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "steps: 1\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="only one parent"):
        read_layers(write(tmp_path / "c.yaml", "extends: b.yaml\n"))


def test_overrides_are_dotted_and_typed_as_yaml():
    assert parse_overrides(["optim.lr.peak=1e-3", "steps=4", "optim.clip=null"]) == {
        "optim": {"lr": {"peak": 1e-3}, "clip": None},
        "steps": 4,
    }
    with pytest.raises(ConfigError, match="key.path=value"):
        parse_overrides(["steps"])


def test_merge_does_not_change_its_arguments():
    base = {"a": {"b": 1}}
    merge(base, {"a": {"c": 2}})
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "optim: {lr: {peek: 1.0, peak: 1.0}}",
            "optim.lr.peek is not a known key; did you mean optim.lr.peak?",
        ),
        ("optim: {lr: {peak: 1.0}}\nextra: {lr: {peak: 1.0, rul: a}}", "did you mean extra.lr.rule?"),
        ("optm: {lr: {peak: 1.0}}", "did you mean optim?"),
        ("optim: {lr: {}}", "optim.lr.peak is missing"),
        ("optim: {lr: {peak: '1'}}", "optim.lr.peak: input should be a valid number, got '1'"),
        ("optim: {lr: {peak: -1.0}}", "optim.lr.peak: input should be greater than 0"),
        ("optim: {lr: {peak: 1.0}, betas: [0.9, 0.1]}", "optim: betas \\(0.9, 0.1\\) fall; give the smaller"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_every_fault_names_the_key_and_the_remedy(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(Tree, write(tmp_path / "bad.yaml", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load(Tree, tmp_path / "nowhere.yaml")
