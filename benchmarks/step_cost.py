"""What a step of the demo costs beside the same step of an older commit, with all that records and watches it.

    python benchmarks/step_cost.py OLD_COMMIT [--rounds 4] [--steps 40]

The old commit is checked out in a folder of its own. In each round both trees train the demo's first steps in turn, in
an order that changes, by `mmoe train` with one thread and a record after every step; the time of a step is the
difference of two records' `wall_seconds`, callbacks and records within. The first steps are left out, and of the rest
the quickest quarter counts. The ratio is the median over the quieter half of the rounds: other jobs on the machine only
add. Prints a table and a last line RESULT {json}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from mmoe.commands.console import Console
from mmoe.result import print_result, target

REPOSITORY = Path(__file__).resolve().parents[1]
WARM = 8  # steps that are left out
MOST = 1.02  # of the old step's time: beyond it a step is said to cost more


def train(tree: Path, folder: Path, steps: int) -> None:
    """Train so many steps in `tree`, with data and run in `folder`; the data is prepared where it is missing."""
    shards = f"data.sources.drive.shards={folder / 'drive'}"
    codec = f"tokenizers.audio.path={folder / 'drive' / 'audio_codec.safetensors'}"
    command = [sys.executable, "-m", "mmoe", "train", "configs/demo.yaml", shards, codec, "--fresh"]
    command += [f"training.run={folder / 'run'}", "monitoring.log_every_steps=1", "--stop-after", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def seconds_per_step(tree: Path, folder: Path, steps: int) -> float:
    """The mean of the quickest quarter of the steps of one training."""
    train(tree, folder, steps)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    walls = [json.loads(line)["wall_seconds"] for line in lines][WARM:]
    times = sorted(after - before for before, after in pairwise(walls))
    return statistics.mean(times[: max(1, len(times) // 4)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", metavar="OLD_COMMIT")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="step-cost-") as scratch:
        folder = Path(scratch)
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder / "tree"), arguments.commit], check=True)
        try:
            sides = {"old": folder / "tree", "new": REPOSITORY}
            for name, tree in sides.items():
                train(tree, folder / name, 1)  # prepares the data
            for number in range(arguments.rounds):
                order = list(sides)[:: -1 if number % 2 else 1]
                times = {name: seconds_per_step(sides[name], folder / name, arguments.steps) for name in order}
                rounds.append(times)
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "tree")], check=True)
    quiet = sorted(rounds, key=lambda times: times["old"] + times["new"])[: (len(rounds) + 1) // 2]
    ratio = statistics.median(times["new"] / times["old"] for times in quiet)
    table = Table("round", "old", "new", "new / old", title="seconds a step", title_justify="left")
    for number, times in enumerate(rounds):
        cells = (f"{times['old']:.4f}", f"{times['new']:.4f}", f"{times['new'] / times['old']:.3f}")
        table.add_row(str(number), *cells)
    Console().print(table)
    print_result("step_cost", {"rounds": rounds, "ratio": ratio}, {"ratio": target(ratio, MOST, at_most=True)})


if __name__ == "__main__":
    main()
