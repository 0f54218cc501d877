"""The documents name what exists, and the check notices what does not."""

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, load_script

TOOL = load_script(REPOSITORY / "tools" / "check_docs.py")
KNOWN = TOOL.commands()


def found(folder: Path, text: str) -> list[str]:
    document = folder / "page.md"
    document.write_text(text)
    return list(TOOL.problems(document, KNOWN))


def test_what_the_documents_name_exists() -> None:
    assert {str(path): problem for path in TOOL.documents() for problem in TOOL.problems(path, KNOWN)} == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[guide](docs/gude.md)", "the link docs/gude.md leads nowhere"),
        ("see mmoe/losses/totl.py.", "mmoe/losses/totl.py does not exist"),
        ("`mmoe trian CONFIG`", "mmoe trian is not a command: mmoe trian CONFIG"),
        ("    mmoe train CONFIG --frsh  # anew", "mmoe train has no --frsh"),
        ("`python tools/capacity_advisor.py --foo`", "tools/capacity_advisor.py has no --foo"),
        ("with `--no-such-option`", "--no-such-option is no option"),
        ("set `training.buget_positions`", "training.buget_positions is no key of the config"),
        ("set `data.sources.drive.shard=x`", "data.sources.drive.shard is no key of the config"),
        ("set `prepare.filters.text.langages=[en]`", "prepare.filters.text.langages is no key of the config"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in found(tmp_path, text)


def test_what_exists_is_no_problem(tmp_path: Path) -> None:
    text = """Under `data.sources.NAME.shards`, `parallel.*` or `metrics.jsonl`; [fsspec](https://example.org).

    torchrun --nproc-per-node 2 -m mmoe train configs/demo.yaml parallel.ep=2 --fresh
    mmoe prepare KIND INPUT OUTPUT prepare.dedup.near=true --workers 2
"""
    assert found(tmp_path, text) == []
