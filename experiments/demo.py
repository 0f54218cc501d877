"""The whole line on a laptop: raw drive -> shards -> training, stopped and resumed -> evaluation -> report.

Every step is the command a user would type; this script only strings them together, watches their memory, and
prints what `runs/demo/summary.json` holds.
"""

import json
import operator
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from mmoe.commands.console import Console
from mmoe.result import print_result
from mmoe.runtime.peak_memory import PeakMemory

CONFIG, RUN = "configs/demo.yaml", Path("runs/demo")
STOP, OVERLAP = 100, 3  # stop OVERLAP steps after the checkpoint of step STOP, resume from it, compare the overlap

console = Console()


def mmoe(*arguments: str) -> float:
    """Run one command; returns its seconds, or ends the demo with the command's exit status."""
    console.rule(f"mmoe {' '.join(arguments)}", align="left")
    started = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "mmoe", *arguments]).returncode
    if status:
        sys.exit(status)
    return time.perf_counter() - started


def main() -> None:
    for folder in (Path("out/demo"), RUN):
        shutil.rmtree(folder, ignore_errors=True)
    digest = f"monitoring.digest_steps=[{STOP + OVERLAP}]"
    started = time.perf_counter()
    with PeakMemory() as memory:
        seconds = {
            "prepare, train, stop": mmoe("train", CONFIG, digest, "--stop-after", str(STOP + OVERLAP)),
            "resume, train, evaluate": mmoe("train", CONFIG, digest, "--from-step", str(STOP)),
            "other images": mmoe("evaluate", str(RUN), "--shuffle", "vision"),
            "no images": mmoe("evaluate", str(RUN), "--blank", "vision"),
            "report": mmoe("report", str(RUN)),
        }
    wall = time.perf_counter() - started
    path = RUN / "summary.json"
    summary = json.loads(path.read_text())
    summary |= {"wall_seconds": wall, "peak_memory_bytes": memory.peak, "seconds_by_part": seconds}
    path.write_text(json.dumps(summary, indent=1))
    show(summary, seconds)
    targets = {what: {"value": value, "target": target, "ok": ok} for what, value, target, ok in checks(summary)}
    print_result("demo", summary, targets)


def checks(summary: dict) -> list[tuple[str, float, str, bool]]:
    """(what, value, target, reached) of everything that the demo must reach."""
    mse, baselines, retrieval = summary["action_mse"], summary["action_mse_baselines"], summary["retrieval"]
    shuffled = summary["action_mse_shuffle_vision"]
    found = [
        ("packing efficiency", summary["packing_efficiency"], ">=", 0.97),
        ("action error / mean baseline", mse / baselines["mean"], "<=", 0.35),
        ("action error / holding the last action", mse / baselines["hold_last"], "<=", 0.7),
        ("action error / ridge baseline", mse / baselines["ridge"], "<", 1.0),
        ("error with other images / action error", shuffled / mse, ">=", 2.0),
        ("error with other images / mean baseline", shuffled / baselines["mean"], ">=", 0.8),
        ("recall@1 of 64", retrieval["r1"], ">=", 0.12),
        ("recall@1, lower bound", retrieval["r1_low"], ">", 0.06),
        ("resume exact", summary["resume_exact"], "==", True),
        ("wall seconds", summary["wall_seconds"], "<=", 360),
        ("peak memory, GiB", summary["peak_memory_bytes"] / 2**30, "<", 6),
    ]
    relation = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "==": operator.eq}
    return [(what, value, f"{sign} {bound}", relation[sign](value, bound)) for what, value, sign, bound in found]


def show(summary: dict, seconds: dict[str, float]) -> None:
    table = Table("figure", "value", "must reach", "")
    for what, value, target, ok in checks(summary):
        table.add_row(what, str(value) if isinstance(value, bool) else f"{value:.4g}", target, "ok" if ok else "MISSED")
    blank = summary["action_mse_blank_vision"] / summary["action_mse_baselines"]["mean"]
    table.add_row("error without images / mean baseline", f"{blank:.4g}", "", "")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}", "", "")
    for part, value in seconds.items():
        table.add_row(f"seconds: {part}", f"{value:.0f}", "", "")
    console.print(table)
    console.print(f"open {RUN / 'report.html'}")


if __name__ == "__main__":
    main()
