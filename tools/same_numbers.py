"""Does this tree train to the same numbers as an older commit, bit for bit? For changes that move code and no number.

    python tools/same_numbers.py OLD_COMMIT
    python tools/same_numbers.py HEAD --recipes text_moe --layouts one --steps 20
    python tools/same_numbers.py OLD_COMMIT --from-checkpoint

The old commit is checked out beside this tree, in a folder that is removed at the end. Both trees prepare the same
recordings and train the first steps of each recipe, on one process and on two with `ep` 2, on this machine and with
this Python: another processor rounds differently, so numbers written down elsewhere prove nothing. Of every step the
losses, the rate and the gradient norm are compared as they are printed (a float64 is printed in full), and digests of
all weights, buffers and optimizer states after the first, the middle and the last step.

Texts come from the old commit for both: recipes that read this repository's own files would else differ by them. A
loss term or a figure that only one tree records is listed, and is no difference. The exit status is 1 where a number
differs, 2 where a run failed.

Where parameters have other names in this tree they begin with other values, which their names seed. With
`--from-checkpoint` this tree goes on from checkpoints that the old one wrote, of step 0 and of the middle step, and of
the steps after them the same is compared but for the digests, which hold the names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmoe.result import print_result

REPOSITORY = Path(__file__).resolve().parents[1]
LAYOUTS = {"one": 1, "ep2": 2}  # processes
COMPARED = ("loss", "lr", "grad_norm", "digest")  # and all that begins with loss_
# Writes the checkpoint of step 0, for which no command is: config and overrides are arguments.
BEGIN = """
import sys
from mmoe.config.load import load
from mmoe.recipe.config import RunConfig
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
run = Run.build(load(RunConfig, sys.argv[1], sys.argv[2:]))
run.save_config()
Trainer(run, []).save()
"""


@dataclass(frozen=True)
class Side:
    """One tree, and the folder that its data and runs go to."""

    name: str
    tree: Path
    folder: Path

    def train(self, recipe: str, layout: str, steps: int, texts: Path) -> list[dict[str, Any]]:
        """The records of the first `steps` steps of a recipe. Raises RuntimeError where the training fails."""
        run = self.run(recipe, layout)
        config, *overrides = self._recipe(recipe, steps, texts)
        command = [*_launch(layout), "-m", "mmoe", "train", config, *overrides, f"parallel.ep={LAYOUTS[layout]}"]
        self._do([*command, f"training.run={run}", "--stop-after", str(steps)])
        return _records(run)

    def begin(self, recipe: str, steps: int, texts: Path) -> Path:
        """The folder of a run of the recipe that has a checkpoint of step 0; its data is prepared by now."""
        run = self.run(recipe, "begun")
        if not run.exists():
            self._do(["-c", BEGIN, *self._recipe(recipe, steps, texts), f"training.run={run}"])
        return run

    def go_on(self, run: Path, layout: str, step: int, steps: int) -> list[dict[str, Any]]:
        """The records of the steps after `step`, from which a copy of `run`, of whatever version, goes on here."""
        copy = self.folder / f"{run.name}-{layout}-from-{step}"
        shutil.copytree(run, copy)
        command = [*_launch(layout), "-m", "mmoe", "train", str(copy), f"parallel.ep={LAYOUTS[layout]}"]
        self._do([*command, "--from-step", str(step), "--stop-after", str(steps)])
        return [record for record in _records(copy) if record["step"] > step]

    def run(self, recipe: str, layout: str) -> Path:
        """The folder of this side's run of a recipe in a layout."""
        return self.folder / f"run-{recipe}-{layout}"

    def _do(self, command: list[str]) -> None:
        # One thread a process: with more, sums may be cut differently from run to run.
        environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.tree, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")

    def _recipe(self, recipe: str, steps: int, texts: Path) -> list[str]:
        """The config of the recipe in this tree, and the overrides of every run of it."""
        config = self.tree / "configs" / f"{recipe}.yaml"
        middle = (steps + 1) // 2
        return [
            str(config),
            *self._places(config, recipe, texts),
            "training.micro_batch_sequences=null",
            "monitoring.log_every_steps=1",
            f"monitoring.digest_steps={sorted({1, middle, steps})}",
            f"checkpoint.every_steps={middle}",
        ]

    def _places(self, config: Path, recipe: str, texts: Path) -> Iterator[str]:
        """Overrides that put the recipe's data into this side's folder and read its recordings from `texts`.

        By the paths that the recipe of `texts` has: a file that has moved since lies there under its old one.
        """
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        sources = yaml.safe_load((texts / "configs" / config.name).read_text(encoding="utf-8"))["data"]["sources"]
        data = self.folder / recipe
        for name, source in tree["data"]["sources"].items():
            yield f"data.sources.{name}.shards={data / name}"
            if source.get("input"):
                yield f"data.sources.{name}.input={texts / sources[name]['input']}"
        if path := tree.get("tokenizers", {}).get("text", {}).get("path"):
            yield f"tokenizers.text.path={data / Path(path).name}"
        if path := (tree.get("tokenizers", {}).get("audio") or {}).get("path"):
            yield f"tokenizers.audio.path={data / Path(path).parent.name / Path(path).name}"


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit, for as long as the context lasts."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _launch(layout: str) -> list[str]:
    processes = LAYOUTS[layout]
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compared_sides(
    old: Side, new: Side, recipe: str, layout: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """What is compared, as a name and the records of the old tree and of the new one."""
    steps, case = arguments.steps, f"{recipe}, {layout}"
    before = old.train(recipe, layout, steps, old.tree)
    if not arguments.from_checkpoint:
        yield case, before, new.train(recipe, layout, steps, old.tree)
        return
    for step, run in ((0, old.begin(recipe, steps, old.tree)), ((steps + 1) // 2, old.run(recipe, layout))):
        after = new.go_on(run, layout, step, steps)
        for record in (*before, *after):
            record.pop("digest", None)
        yield f"{case}, from step {step}", before[step:], after


def differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[str], set[str], int]:
    """What differs as sentences, the names that one side alone records, and how many numbers were compared."""
    found, alone, compared = [], set(), 0
    if [record["step"] for record in old] != [record["step"] for record in new]:
        found.append(f"steps {[r['step'] for r in old]} against {[r['step'] for r in new]}")
    for before, after in zip(old, new):
        names = [name for name in before.keys() | after.keys() if name in COMPARED or name.startswith("loss_")]
        alone |= {name for name in names if (name in before) != (name in after)}
        for name in sorted(set(names) - alone):
            compared += 1
            if before[name] != after[name]:
                found.append(f"step {before['step']}: {name} was {before[name]!r}, is {after[name]!r}")
    return found, alone, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", metavar="OLD_COMMIT")
    parser.add_argument("--recipes", nargs="+", default=["demo", "text_moe"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--from-checkpoint", action="store_true", help="go on from what the old commit wrote")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        folder = Path(scratch)
        with worktree(arguments.commit, folder / "tree") as tree:
            old, new = Side("old", tree, folder / "old"), Side("new", REPOSITORY, folder / "new")
            for recipe in arguments.recipes:
                for layout in arguments.layouts:
                    try:
                        for case, before, after in compared_sides(old, new, recipe, layout, arguments):
                            found, alone, number = differences(before, after)
                            figures[case] = {"compared": number, "differ": len(found), "recorded_by_one": sorted(alone)}
                            print(f"{case}: {number} numbers of {len(after)} steps, {len(found)} differ", flush=True)
                            print("".join(f"  {line}\n" for line in found[:10]), end="", flush=True)
                    except RuntimeError as error:
                        print(error, file=sys.stderr)
                        figures[f"{recipe}, {layout}"], failed = {"failed": True}, True
    same = {case: each for case, each in figures.items() if "differ" in each}
    targets = {c: {"value": each["differ"], "target": 0, "ok": not each["differ"]} for c, each in same.items()}
    print_result("same_numbers", figures, targets)
    sys.exit(2 if failed else int(any(not each["ok"] for each in targets.values())))


if __name__ == "__main__":
    main()
