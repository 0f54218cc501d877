"""What the documents name exists: files and links, commands and their options, scripts' options, and config keys.

README, CONTRIBUTING, CHANGELOG and docs/ are read; in code (spans and indented lines) every `mmoe <command> --option`,
`python tools/<script> --option` and dotted key of the run's or the preparation's config is looked up.
"""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from mmoe.preparation.prepare import PrepareConfig
from mmoe.recipe.config import RunConfig
from mmoe.result import print_result

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmoe", "tools", "benchmarks", "configs", "docs", "experiments", "tests")
LINK = re.compile(r"\]\(([^)#\s]+)")
PATH = re.compile(rf"(?<![\w./<-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w")
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|[\s/])mmoe ([a-z][a-z-]*)\b(.*)")
SCRIPT = re.compile(r"((?:tools|benchmarks|experiments)/\w+\.py)(.*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
KEY = re.compile(r"(?<![\w./{-])[a-z_]+(?:\.(?:[A-Za-z_]+|\*))+(?![\w/(])")


def documents() -> list[Path]:
    """List the documents of the repository."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(path: Path) -> str:
    """Read a document without its blocks of Python, which the tests of extensions run."""
    return re.sub(r"^```python\n.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> Iterator[str]:
    """Yield what stands as code: spans, on one line or two, and lines that are indented by four."""
    yield from (span.replace("\n", " ") for span in SPAN.findall(text))
    yield from (line.partition(" # ")[0] for line in text.splitlines() if line.startswith("    "))


def commands() -> dict[str, set[str]]:
    """Map every command of the command line to its options."""
    entry = re.search(r'^mmoe = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    group = typer.main.get_command(importlib.import_module(entry[1]).app)
    return {name: {"--help"}.union(*(p.opts for p in command.params)) for name, command in group.commands.items()}


def has_key(kind: Any, names: list[str]) -> bool:
    """Say whether the type of a config field has the dotted key below it; any name is one of a dict."""
    if not names or names[0] == "*":
        return True
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or origin is dict:
        return kind is Any or has_key(arguments[1], names[1:])
    if origin is Annotated:
        return has_key(arguments[0], names)
    if origin is Union or type(kind).__name__ == "UnionType":
        return any(has_key(each, names) for each in arguments)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields
        return names[0] in fields and has_key(fields[names[0]].annotation, names[1:])
    return False


def problems(document: Path, known: dict[str, set[str]]) -> Iterator[str]:
    """Yield a sentence for each thing that a document names and that does not exist."""
    text = prose(document)
    for link in LINK.findall(text):
        if ":" not in link and not (document.parent / link).exists():
            yield f"the link {link} leads nowhere"
    for path in PATH.findall(text):
        if not any(ROOT.glob(path)):
            yield f"{path} does not exist"
    every = set().union(*known.values(), *(OPTION.findall(path.read_text()) for path in ROOT.glob("*/*.py")))
    for piece in code(text):
        if found := COMMAND.search(piece):
            name, rest = found.groups()
            if name not in known:
                yield f"mmoe {name} is not a command: {piece.strip()}"
            yield from (f"mmoe {name} has no {o}" for o in OPTION.findall(rest) if o not in known.get(name, {o}))
        elif found := SCRIPT.search(piece):
            path, rest = found.groups()
            options = OPTION.findall((ROOT / path).read_text()) if (ROOT / path).is_file() else []
            yield from (f"{path} has no {option}" for option in OPTION.findall(rest) if option not in options)
        elif piece.startswith("--"):
            yield from (f"{option} is no option" for option in OPTION.findall(piece) if option not in every)
        for key in KEY.findall(piece):
            first, *names = key.split(".")
            root, names = (PrepareConfig, names) if first == "prepare" else (RunConfig, [first, *names])
            if (first == "prepare" or first in RunConfig.model_fields) and not has_key(root, names):
                yield f"{key} is no key of the config"


def main() -> int:
    """Print every problem and the result; returns the exit status."""
    known, found, read = commands(), 0, documents()
    for document in read:
        for problem in dict.fromkeys(problems(document, known)):
            print(f"{document.relative_to(ROOT)}: {problem}")
            found += 1
    print_result("docs", {"documents": len(read)}, {"problems": {"value": found, "target": 0, "ok": not found}})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
