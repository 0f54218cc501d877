"""Names of the package say one thing each, in the field's words, and the check notices those that do not."""

from pathlib import Path

from tests.conftest import REPOSITORY, load_script

TOOL = load_script(REPOSITORY / "tools" / "check_names.py")


def package(folder: Path, **modules: str) -> Path:
    root = folder / "mmoe"
    root.mkdir()
    for name, text in modules.items():
        (root / f"{name}.py").write_text(text)
    return root


def test_the_package_holds_no_word_that_was_given_up_and_explains_every_name_it_has_twice() -> None:
    assert list(TOOL.replaced(TOOL.PACKAGE)) == []
    assert TOOL.shared(TOOL.PACKAGE).keys() == TOOL.SHARED.keys()


def test_a_name_of_two_modules_is_found_and_private_or_nested_ones_are_not(tmp_path: Path) -> None:
    first = "class Layout: ...\n_mine = 1\nTABLE: int = 2\n\ndef build():\n    Nested = 3\n"
    root = package(tmp_path, a=first, b="Layout = 1\n_mine = 2\nNested = 4\n", c="TABLE = 3\n")
    assert TOOL.shared(root) == {"Layout": ["a.py", "b.py"], "TABLE": ["a.py", "c.py"]}


def test_words_that_were_given_up_are_found_in_identifiers_and_nowhere_else(tmp_path: Path) -> None:
    text = (
        '"""The choice_bias of a picture."""\n'
        "not_allowed = replacement = 1\n"
        "choice_bias = 2  # a film\n"
        "load_picture = normalised = 3\n"
    )
    found = list(TOOL.replaced(package(tmp_path, a=text)))
    assert [sentence.split("; ")[0].rpartition(" ")[2] for sentence in found] == [
        "choice_bias",
        "load_picture",
        "normalised",
    ]
    assert found[0] == "mmoe/a.py:3: choice_bias; the word is expert_bias"
