"""Every key and option that a sentence of the package names is one that a config or a command takes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmoe.config.describe import options
from mmoe.preparation.prepare import PrepareConfig
from mmoe.preparation.sources import SOURCES
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY, load_script

DOCS = load_script(REPOSITORY / "tools" / "check_docs.py")
KEY = re.compile(r"(?<![\w./{<-])[a-z][a-z_0-9]*(?:\.(?:[A-Za-z_0-9]+|\*))+(?![\w/(])")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FILE = re.compile(r"\.(json|jsonl|csv|yaml|html)$")
ANY = "X"  # stands where a sentence is filled in

# Dotted words that are no keys of ours, and options of other programs that sentences name.
WORDS = {"e.g", "key.path", "v1.0", "model.ignore_merges", "torch.distributed", "numpy.save", "numpy.savez"}
MODULES = ("mmoe.", "lerobot.")
OTHERS = {
    *("--nproc-per-node", "--max-restarts"),  # torchrun
    *("--sparse", "--sort", "--dereference", "--hard-dereference"),  # tar
    "--last",  # tools/capacity_advisor.py
}


def sentences(source: str) -> Iterator[str]:
    """String literals of several words, docstrings apart, with `ANY` for what is filled in."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    skipped = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in skipped and " " in text(node):
            yield text(node)


def text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return ANY


def is_key(key: str) -> bool:
    first, *names = key.split(".")
    names[-1:] = ["*"] if ANY in names[-1] else names[-1:]  # a filled-in part before others is a name in a mapping
    if first == "prepare":
        return DOCS.has_key(PrepareConfig, names)
    if first in RunConfig.model_fields:
        return DOCS.has_key(RunConfig, [first, *names])
    return any(DOCS.has_key(SOURCES.find(kind).config, [first, *names]) for kind in SOURCES.kinds())


def problems(source: str, commands: dict[str, set[str]]) -> list[str]:
    every = set().union(*commands.values(), OTHERS)
    found = []
    for sentence in sentences(source):
        keys = [key for key in KEY.findall(sentence) if not FILE.search(key) and not key.startswith(MODULES)]
        found += [f"{key} in: {sentence}" for key in keys if key not in WORDS and not is_key(key)]
        asked = re.search(r"mmoe ([a-z-]+) ", sentence)
        known = commands.get(asked[1], every) if asked else every
        found += [f"{option} in: {sentence}" for option in OPTION.findall(sentence) if option not in known | OTHERS]
    return found


def test_every_key_and_option_that_a_sentence_names_can_be_given():
    commands, found = DOCS.commands(), {}
    for path in sorted((REPOSITORY / "mmoe").rglob("*.py")):
        if faults := problems(path.read_text(), commands):
            found[str(path.relative_to(REPOSITORY))] = faults
    assert found == {}


def test_what_a_preparation_advises_is_an_option_of_a_preparation():
    """There is no config of a run while `mmoe prepare` runs; `mmoe train` alone calls `ensure_prepared`."""
    found = {}
    for path in sorted((REPOSITORY / "mmoe/preparation").rglob("*.py")):
        if path.name != "ensure_prepared.py":
            keys = [key for sentence in sentences(path.read_text()) for key in KEY.findall(sentence)]
            if wrong := [key for key in keys if key.split(".")[0] in RunConfig.model_fields and not FILE.search(key)]:
                found[path.name] = wrong
    assert found == {}


@pytest.mark.parametrize(
    "line, wrong",
    [
        ('f"set data.video_backend=pyav for {file}"', None),
        ('f"set data.vidio_backend=pyav for {file}"', "data.vidio_backend"),
        ('f"raise data.bounds.{name} a little"', None),
        ('f"raise data.bound.{name} a little"', "data.bound.X"),
        ('f"correct data.sources.{name}.input, please"', None),
        ('f"correct data.sources.{name}.inputs, please"', "data.sources.X.inputs"),
        ('"write rig.cameras in it"', None),
        ('"give moe.expert_backend a value"', "moe.expert_backend"),
        ('"as mmoe prepare --fresh does"', None),
        ('"as mmoe report --fresh does"', "--fresh"),
        ('"give --from-steps again"', "--from-steps"),
        ('"see metadata.csv of it"', None),
    ],
)
def test_a_wrong_one_is_noticed(line, wrong):
    found = problems(f"raise ValueError({line})", DOCS.commands())
    assert [each.partition(" in: ")[0] for each in found] == ([wrong] if wrong else [])


def test_a_readers_options_are_known_by_their_dotted_names():
    assert all(is_key(o.name) for kind in SOURCES.kinds() for o in options(SOURCES.find(kind).config) if "." in o.name)
    assert Path(REPOSITORY, "tools/capacity_advisor.py").read_text().count("--last")
