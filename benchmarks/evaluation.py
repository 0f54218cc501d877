"""Seconds and memory of an evaluation, on one process and on several that share the model.

    python benchmarks/evaluation.py [1 2]

A dense model of 124 M parameters (width 768, 16 layers; 0.5 GB in float32) with its initial weights, and made-up text.
Every number of processes loads the same checkpoint, spread by FSDP2, and measures it whole; each process has one
thread. Memory is the peak resident size of a process over what it was once the modules were loaded: weights, what is
gathered of them, and activations. glibc is told to give freed memory back (MALLOC_MMAP_THRESHOLD_): else it keeps what
every layer was gathered into, and the peak says nothing of what a rank needs. Prints a table and a last line RESULT
{json}.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from rich.table import Table

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.commands.console import Console
from mmoe.commands.prepare import prepare_missing
from mmoe.config.load import dump, validate
from mmoe.evaluation.evaluate import evaluate
from mmoe.recipe.config import RunConfig
from mmoe.result import print_result, target
from mmoe.runtime.agreement import ProcessGroupRanks
from mmoe.runtime.launch import distributed_context
from mmoe.training.fingerprint import fingerprint
from mmoe.training.run import CONFIG, Run

SHARE = 0.75  # of one process's memory, that a rank of two may take
LINES = 2000
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # read at a process's start
ENVIRONMENT = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1"}
MODEL = {"d_model": 768, "n_layers": 16, "n_heads": 12, "n_kv_heads": 12, "intermediate_size": 2304}


def tree(root: Path) -> dict:
    return {
        "data": {
            "sources": {"lines": {"kind": "text", "input": f"{root}/lines.txt", "shards": f"{root}/lines"}},
            "sequence_length": 512,
        },
        "tokenizers": {"text": {"path": f"{root}/text.json", "vocabulary_size": 2048}},
        "model": MODEL,
        "losses": {"contrastive": {"weight": 0.0}},
        "optim": {"lr": {"peak": 1e-3}},
        "parallel": {"threads": 1},
        "training": {
            "run": f"{root}/run",
            "micro_batch_sequences": 2,
            "global_batch_positions": 4096,
            "budget_positions": 4096,
        },
    }


def make(root: Path) -> None:
    """The run that is measured, its weights those of the start."""
    lines = [f"Line {i} of a text about the number {i * i % 997}, and about its lines.\n\n" for i in range(LINES)]
    (root / "lines.txt").write_text("".join(lines))
    config = validate(RunConfig, tree(root), "the benchmark")
    prepare_missing(config.data.sources, config.tokenizers.text)
    run = Run.build(config)
    run.save_config()
    state = {"model": run.model.state_dict(), "trainer": {"data": fingerprint(run.sources, run.tokenizers)}}
    CheckpointManager(run.folder / "checkpoints", config.checkpoint).save(0, state, {CONFIG: dump(run.config)})


def resident() -> int:
    """Bytes, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(folder: Path) -> None:
    """What one process does; the first one prints the figures of all."""
    with distributed_context(600, folder):
        before, started = resident(), time.perf_counter()
        run = Run.load(folder)
        loaded = time.perf_counter()
        evaluate(run)
        ended = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        peaks = ProcessGroupRanks().gather(peak)
        if run.ranks.first:
            figures = {"load_seconds": loaded - started, "seconds": ended - loaded, "peak_bytes": max(peaks)}
            print("FIGURES " + json.dumps(figures), flush=True)
        if dist.is_initialized():
            dist.barrier()


def started(root: Path, world: int) -> dict[str, float]:
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [__file__, "--measure", str(root / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the evaluation on {world} processes failed; its error is above")
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES "))
    return json.loads(line.removeprefix("FIGURES "))


def main() -> None:
    worlds = [int(argument) for argument in sys.argv[1:]] or [1, 2]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make(root)
        figures = {str(world): started(root, world) for world in worlds}
    table = Table("processes", "load, s", "evaluation, s", "peak memory a rank, GiB")
    for world, found in figures.items():
        seconds = f"{found['load_seconds']:.1f}", f"{found['seconds']:.1f}"
        table.add_row(world, *seconds, f"{found['peak_bytes'] / 2**30:.2f}")
    Console().print(table)
    targets = {}
    if {"1", "2"} <= figures.keys():
        share = figures["2"]["peak_bytes"] / figures["1"]["peak_bytes"]
        targets["memory of a rank of two over that of one process"] = target(share, SHARE, at_most=True)
    print_result("evaluation", figures, targets)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        main()
