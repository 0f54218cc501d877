"""A config with what its keys mean: every key of a run has a comment, and what is printed is the config again."""

import typing

import pytest
import yaml
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.config.base import Config
from mmoe.config.describe import described, meaning
from mmoe.config.load import load
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


class Inner(Config):
    """Says what is inside. And more."""

    size: int = 3  # in pixels
    # Above it,
    # in two lines.
    name: str = "a"


class Heir(Inner):
    """Inherits."""

    size: int = 4
    long: tuple[int, ...] = ()  # behind the last line


class Outer(Config):
    """Holds others."""

    inner: Inner = Inner()
    others: dict[str, Inner] = {}  # by name
    odd: dict[str, object] = {}
    text: str  # given


def test_a_comment_is_behind_the_field_or_above_it_and_inherited_with_it() -> None:
    assert [meaning(Inner, name) for name in ("size", "name")] == ["in pixels", "Above it, in two lines."]
    assert [meaning(Heir, name) for name in ("size", "name", "long")] == [
        "",
        "Above it, in two lines.",
        "behind the last line",
    ]


def test_keys_values_defaults_and_meanings_stand_in_lines_that_yaml_reads() -> None:
    config = Outer(
        inner=Inner(size=5), others={"on": Inner(), "b: c": Inner(name="é")}, odd={"x": [1, None]}, text="null # no"
    )
    lines = described(config).splitlines()
    assert yaml.safe_load(described(config)) == config.model_dump(mode="json")
    assert lines[0].split("  # ") == ["inner:".ljust(44), "Says what is inside. And more"]
    assert lines[1].split("  # ") == ["  size: 5".ljust(44), "in pixels; default 3"]
    assert lines[3].split("  # ") == ["others:".ljust(44), "by name; default {}"]
    assert lines[-1].rpartition("  # ")[2] == "given"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_printed_as_what_it_is(path, tmp_path) -> None:
    done = CliRunner().invoke(app, ["config", str(path), "training.seed=7"])
    (tmp_path / "again.yaml").write_text(done.output)
    assert load(RunConfig, tmp_path / "again.yaml") == load(RunConfig, path, ["training.seed=7"])
    seed = next(line for line in done.output.splitlines() if line.lstrip().startswith("seed: 7"))
    assert seed.endswith("# of weights, data and noise; default 0")


def test_every_key_of_a_run_says_what_it_means() -> None:
    seen, silent = set(), []

    def walk(kind: type[Config]) -> None:
        seen.add(kind)
        for name, field in kind.model_fields.items():
            nodes = list(configs(field.annotation))
            if not meaning(kind, name) and not nodes and name != "kind":
                silent.append(f"{kind.__name__}.{name}")
            for node in set(nodes) - seen:
                walk(node)

    def configs(annotation: object) -> typing.Iterator[type[Config]]:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            yield annotation
        for part in typing.get_args(annotation):
            yield from configs(part)

    walk(RunConfig)
    assert not silent and len(seen) > 30
