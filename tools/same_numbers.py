"""Does this tree train to the same numbers as an older commit, bit for bit? For changes that move code and no number.

    python tools/same_numbers.py OLD_COMMIT
    python tools/same_numbers.py HEAD --recipes text_moe --layouts one --steps 20

The old commit is checked out beside this tree, in a folder that is removed at the end. Both trees prepare the same
recordings and train the first steps of each recipe, on one process and on two with `ep` 2, on this machine and with
this Python: another processor rounds differently, so numbers written down elsewhere prove nothing. Of every step the
losses, the rate and the gradient norm are compared as they are printed (a float64 is printed in full), and digests of
all weights, buffers and optimizer states after the first, the middle and the last step.

Texts come from the old commit for both: recipes that read this repository's own files would else differ by them. A
loss term or a figure that only one tree records is listed, and is no difference. The exit status is 1 where a number
differs, 2 where a run failed.
"""

import argparse
import json
import os
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


@dataclass(frozen=True)
class Side:
    """One tree, and the folder that its data and runs go to."""

    name: str
    tree: Path
    folder: Path

    def train(self, recipe: str, layout: str, steps: int, texts: Path) -> list[dict[str, Any]]:
        """The records of the first `steps` steps of a recipe. Raises RuntimeError where the training fails."""
        config = self.tree / "configs" / f"{recipe}.yaml"
        run = self.folder / f"run-{recipe}-{layout}"
        processes = LAYOUTS[layout]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), "-m", "mmoe", "train", str(config)]
        command += [*self._places(config, recipe, texts), f"training.run={run}", f"parallel.ep={processes}"]
        command += ["training.micro_batch_sequences=null", "monitoring.log_every_steps=1"]
        command += [f"monitoring.digest_steps={sorted({1, (steps + 1) // 2, steps})}"]
        command += ["--stop-after", str(steps)]
        # One thread a process: with more, sums may be cut differently from run to run.
        environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

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
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        folder = Path(scratch)
        with worktree(arguments.commit, folder / "tree") as tree:
            sides = [Side("old", tree, folder / "old"), Side("new", REPOSITORY, folder / "new")]
            for recipe in arguments.recipes:
                for layout in arguments.layouts:
                    case = f"{recipe}, {layout}"
                    try:
                        old, new = (side.train(recipe, layout, arguments.steps, tree) for side in sides)
                    except RuntimeError as error:
                        print(error, file=sys.stderr)
                        figures[case], failed = {"failed": True}, True
                        continue
                    found, alone, compared = differences(old, new)
                    figures[case] = {"compared": compared, "differ": len(found), "recorded_by_one": sorted(alone)}
                    print(f"{case}: {compared} numbers of {len(new)} steps, {len(found)} differ", flush=True)
                    print("".join(f"  {line}\n" for line in found[:10]), end="", flush=True)
    same = {case: each for case, each in figures.items() if "differ" in each}
    targets = {c: {"value": each["differ"], "target": 0, "ok": not each["differ"]} for c, each in same.items()}
    print_result("same_numbers", figures, targets)
    sys.exit(2 if failed else int(any(not each["ok"] for each in targets.values())))


if __name__ == "__main__":
    main()
