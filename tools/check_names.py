"""Do the package's names say one thing each, in the field's words?

    python tools/check_names.py

Two checks over every module of `mmoe`. Top-level names that several modules define must stand in `SHARED`, which says
what the one meaning of each is. Identifiers must hold none of `REPLACED`: words that were given up for the field's own,
with what stands in their place (docs/glossary.md has the terms). The exit status is 1 where a name is found.
"""

import ast
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mmoe.result import print_result

PACKAGE = Path(__file__).resolve().parents[1] / "mmoe"
COMMAND = "a command, and the function that does what it asks for"
ROW = "what every file of its room declares under this name, to be found by it"
SHARED = {
    "FORMAT": "the format that a module writes of its file",
    "MANIFEST": "the name of the file that says what a folder holds",
    "MS": "a millisecond in ns",
    "PERIOD_NS": "the period of a reader's slices",
    "SKEW_BUDGET_NS": "a reader's default for `skew.budget_ns`",
    "INERTIAL_ROWS": "readings of an inertial unit that a slice has",
    "SYNTHETIC": "the sentence on times that were made, not measured",
    "SOURCE": ROW,
    "SPEC": ROW,
    "items": ROW,
    "describe": ROW,
    "suggest": ROW,
    "logger": "the module's own",
    "C": "a type variable: a config",
    "Count": "a type variable: an int, or an array of them",
    "T": "a type variable: anything",
    **dict.fromkeys(("evaluate", "export", "generate", "inspect", "prepare", "train", "upcycle"), COMMAND),
}
REPLACED = {
    r"network": "feed_forward",
    r"choice_bias": "expert_bias",
    r"(?<!re)placement": "permutation",
    r"[Tt]ally|tallies": "source report, counts",
    r"hygiene": "filters",
    r"[Ff]ilm": "video",
    r"[Pp]icture": "image",
    r"[Ss]ound(?!file|File)": "audio",
    r"(?<![a-z])owed": "deficit",
    r"widen": "upcast",
    r"[Gg]ather_constant|split_sum|add_up": "the collective with its gradient in its name",
    r"JointOptimizer": "CompositeOptimizer",
    r"StepLoads": "ExpertLoadAccumulator",
    r"PlannedCounts": "LossDenominators",
    r"embeds_first": "needs_embedding_pass",
    r"expert_shard": "edp",
    r"AttentionPlan|DensePlan|DocumentPlan": "AttentionBackend and its kinds",
    r"(?i)(al|organ|recogn|summar|synchron|token|quant|item|optim)is(e|ed|es|ing|ation)(?![a-z])": "-ize",
    r"(?i)colour|centre|neighbour|behaviour|labelled": "American spelling",
}
# Of others: arguments of torch and of libraries.
FOREIGN = {"shard_placement_fn", "placements", "grad_placements", "output_placements"}


def shared(package: Path) -> dict[str, list[str]]:
    """The public top-level names that several modules define, each with its modules."""
    found = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for name in _defined(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_"):
                found[name].append(str(path.relative_to(package)))
    return {name: modules for name, modules in found.items() if len(modules) > 1}


def replaced(package: Path) -> Iterator[str]:
    """Sentences on identifiers that hold a word which was given up."""
    for path in sorted(package.rglob("*.py")):
        with path.open(encoding="utf-8") as file:
            names = {
                token.string: token.start[0]
                for token in tokenize.generate_tokens(file.readline)
                if token.type == tokenize.NAME and token.string not in FOREIGN
            }
        for name, line in names.items():
            for word, instead in REPLACED.items():
                if re.search(word, name):
                    yield f"{path.relative_to(package.parent)}:{line}: {name}; the word is {instead}"


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def main() -> None:
    several, words = shared(PACKAGE), list(replaced(PACKAGE))
    unexplained = {name: modules for name, modules in several.items() if name not in SHARED}
    stale = sorted(SHARED.keys() - several.keys())
    for name, modules in unexplained.items():
        print(f"{name} is defined in {', '.join(modules)}: rename all but one, or say in SHARED what all of them mean")
    for name in stale:
        print(f"{name} stands in SHARED and is defined once: remove it there")
    print("".join(f"{sentence}\n" for sentence in words), end="")
    figures = {"shared": len(several), "unexplained": len(unexplained), "replaced": len(words)}
    faults = len(unexplained) + len(stale) + len(words)
    print_result("check_names", figures, {"faults": {"value": faults, "target": 0, "ok": not faults}})
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
