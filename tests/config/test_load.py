"""Reading configs: parents, overrides, strictness, and the sentences a user gets."""

import pytest
from pydantic import Field, model_validator

from mmoe.config.base import Address, Config, Options
from mmoe.config.load import absolute, dump, load, merge, parse_overrides, read_layers
from mmoe.errors import ConfigError, did_you_mean, near_name


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


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("steps", "is not of the form key.path=value"),
        ("=4", "is not of the form key.path=value"),
        ("optim..lr=4", "is not of the form key.path=value"),
        ("optim.=4", "is not of the form key.path=value"),
        (" =4", "is not of the form key.path=value"),
        ("steps=[1", "override 'steps=\\[1' is not valid YAML"),
        ("steps=&a [*a]", "override 'steps=&a \\[\\*a\\]', line 1: the alias"),
        ("steps=\ud800", "is not UTF-8"),
        (".".join("a" * 100) + "=1", "names a key 100 levels deep"),
        ("steps=2020-01-01", "steps: input should be a valid integer, got '2020-01-01'; write it in plain decimal"),
        ("steps.x=1", "steps: input should be a valid integer, got {'x': 1}"),
        ("optim=[1]", "optim: input should be an object, got \\[1\\]"),
        ("optim.betas=[0.1, .inf]", "optim.betas.1: input should be a finite number, got inf; use null"),
        ("optim.clip=.nan", "optim.clip: input should be a finite number, got nan"),
        ("optim.clip=1e400", "optim.clip: input should be a finite number"),
        ("optim.clip=no", "optim.clip: input should be a valid number, got 'no'; write it in plain decimal digits"),
    ],
)
def test_every_bad_override_is_one_sentence(tmp_path, override, sentence):
    path = write(tmp_path / "a.yaml", "optim: {lr: {peak: 1.0}}")
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(Tree, path, [override])
    assert "\n" not in str(caught.value)


def test_a_name_is_proposed_only_where_one_is_near(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(Tree, write(tmp_path / "a.yaml", "optim: {lr: {peak: 1.0}}\nzzzzzz: 1\n"))
    assert str(caught.value) == f"{tmp_path / 'a.yaml'}: zzzzzz is not a known key"
    assert did_you_mean("stps", ["steps", "optim"]) == "; did you mean steps?"
    assert did_you_mean("qqq", ["steps", "optim"]) == ""


NAMES = [
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "peak",
    "seed",
    "speed",
    "power",
    "intermediate_size",
    "head_dim",
    "decord",
]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("n_layer", "n_layers"),
        ("num_layers", "n_layers"),
        ("layers", "n_layers"),
        ("peek", "peak"),
        ("decrod", "decord"),
        ("PEAK", "peak"),
        ("intermediate-size", "intermediate_size"),
        ("spead", "speed"),
        ("size", "intermediate_size"),
    ],
)
def test_a_near_word_is_proposed(name, meant):
    assert near_name(name, NAMES) == meant


# flower is no power, pow and header are cut or mixed up beyond one slip in four; two names have the word heads.
@pytest.mark.parametrize("name", ["banana", "flower", "pow", "header", "hidden_size", "heads", "dim", "x", ""])
def test_a_far_word_gets_no_proposal(name):
    assert near_name(name, NAMES) is None


def test_of_many_faults_the_first_are_told(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(Tree, write(tmp_path / "a.yaml", "\n".join(f"z{n}: 1" for n in range(5000))))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1].endswith(": 4981 more faults")  # optim is missing too


class Place(Config):
    folder: Address
    maybe: Address | None = None
    several: tuple[Address, ...] = ()
    named: dict[str, Address] = {}
    word: str = "here"
    options: Options = {}


def test_addresses_are_found_by_their_type_and_made_absolute():
    place = Place(folder="a/../b", maybe="s3://x/y", several=("c", "/d"), named={"e": "./f"}, options={"g": "h"})
    assert absolute(place, "/root") == Place(
        folder="/root/b",
        maybe="s3://x/y",
        several=("/root/c", "/d"),
        named={"e": "/root/f"},
        word="here",
        options={"g": "h"},
    )
    assert absolute(absolute(place, "/root"), "/elsewhere") == absolute(place, "/root")


@pytest.mark.parametrize("empty", ["''", "' '"])
def test_an_empty_address_never_means_the_current_folder(tmp_path, empty):
    with pytest.raises(ConfigError, match="folder: it is empty, which names no folder and no file"):
        load(Place, write(tmp_path / "a.yaml", f"folder: {empty}"))


def test_infinities_hide_nowhere_among_options(tmp_path):
    with pytest.raises(ConfigError, match="options: it holds inf, which is no finite number"):
        load(Place, write(tmp_path / "a.yaml", "folder: a\noptions: {a: [{b: .inf}]}"))
