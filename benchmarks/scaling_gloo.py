"""What communication costs on gloo: two ranks that train one model, beside two copies that know nothing of each other.

    python benchmarks/scaling_gloo.py [dp2 ep2 dp2_zero3]

A mixture-of-experts model of 22 M parameters (width 512, four layers of eight experts), bfloat16 products on the CPU,
8192 positions a step and rank, each process with one thread; ZeRO stage 2, since weights of this size need not be
gathered a second time for the backward pass, and stage 3 beside it. Every process runs gradients, clipping norm and
AdamW of one step after another: alone, then in the layouts, in turn (A B C A B C ...). A round's time is that of its
slower process; the rate of a layout over that of the copies is the median of the rounds' ratios. All processes keep
freed memory (glibc's MALLOC_* settings), which the kernel would else zero again for every gathered weight. The
collectives of a step are counted in an extra one, not timed, and compared with the formula of `mmoe.planning`. Prints
tables and a last line RESULT {json}.
"""

import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table

from mmoe.commands.console import Console
from mmoe.config.load import load
from mmoe.optim.optimizer import build_optimizer
from mmoe.parallel.build import build_spread
from mmoe.parallel.mesh import Mesh, ParallelDims
from mmoe.parallel.ranks import LocalExecutor, StepExecutor
from mmoe.planning.communication import Communication, MicroBatch
from mmoe.planning.communication_trace import CommunicationTrace
from mmoe.planning.communication_traffic import Traffic
from mmoe.planning.dry_run_batch import Assumed, Documents
from mmoe.recipe.config import RunConfig
from mmoe.recipe.resolved import ResolvedRun
from mmoe.result import print_result, target
from mmoe.training.gradients import StepSetting, step_gradients

RANKS, ROUNDS, WARM = 2, 7, 1
POSITIONS = 8192  # a step and rank
DOCUMENTS = 4  # of a sequence of 1024
SHARE = 0.85
LAYOUTS = {"dp2": [], "ep2": ["parallel.ep=2"], "dp2_zero3": ["parallel.zero=3"]}
MODEL = """
model.d_model=512 model.n_layers=4 model.n_heads=8 model.n_kv_heads=4 model.head_dim=64 model.intermediate_size=1024
model.moe.n_experts=8 model.moe.intermediate_size=512 model.moe.top_k=2
data.sequence_length=1024 data.patches_per_sequence=256
tokenizers.vision.max_patches=64 losses.contrastive.group_sequences=1 training.micro_batch_sequences=8 parallel.ep=1
parallel.zero=2
optim.lr.peak=3e-4
""".split()
VOCABULARY = 8192
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**33)}  # read at a process's start


def config_of(layout: str | None) -> RunConfig:
    """Of a layout, or of a copy alone."""
    ranks = 1 if layout is None else RANKS
    batch = f"training.global_batch_positions={POSITIONS * ranks}"
    return load(RunConfig, "configs/moe_10b.yaml", [*MODEL, batch, *(LAYOUTS[layout] if layout else [])])


class Side:
    """One process's part of a layout, or its copy alone: `step` trains one step."""

    def __init__(self, layout: str | None):
        device, config = torch.device("cpu"), config_of(layout)
        self.resolved = ResolvedRun.from_config(config, None if layout is None else RANKS)
        self.assumed = Assumed.from_config(config.tokenizers, 1, VOCABULARY)
        self.mesh: Mesh | None = None
        ranks: StepExecutor = LocalExecutor()
        if layout is None:
            self.model = config.model.build(self.assumed.inputs, 0)
        else:
            self.mesh = Mesh(self.resolved.dims)
            self.model, ranks = build_spread(self.resolved, self.assumed.inputs, 1, 0, self.mesh, device)
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.optim.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        batch, patches = self.resolved.batch, config.tokenizers.vision.max_patches
        self.documents = Documents.from_config(config.data, patches, batch.micro_batch_sequences, DOCUMENTS)
        self.setting = StepSetting.from_run(self.resolved, self.assumed.vocabulary, device, ranks)
        counts = self.documents.counts(batch.sequences, self.assumed)
        self.denominators = self.setting.terms.denominators(counts, batch.sequences)
        self.batch = self.documents.batch(self.assumed)

    def gradients(self) -> None:
        batches = [self.batch] * self.setting.micro_batches
        step_gradients(self.model, batches, self.denominators, self.setting, seed=0)

    def step(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin

    def traffic(self) -> tuple[Traffic, Traffic]:
        """Of a step: counted, and by the formula for capacity, whose exchange does not depend on what is routed."""
        with CommunicationTrace(self.mesh) as trace:
            self.gradients()
        self.optimizer.zero_grad()
        with torch.device("meta"):
            whole = type(self.model)(self.resolved.model, self.assumed.inputs)
        micro = MicroBatch(self.documents.sequences * self.documents.labels, self.documents.sequences * DOCUMENTS)
        return trace.take(), Communication(self.resolved, whole).step(micro, sources=1)


def serve(rank: int, store: str, layouts: list[str], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo",
        store=dist.FileStore(store, RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=300),
    )
    sides = {name: Side(name if name in LAYOUTS else None) for name in ("alone", *layouts)}
    traffic = {name: sides[name].traffic() for name in layouts}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM + ROUNDS):
        for name, side in sides.items():
            dist.barrier()  # both begin together, so that each has the machine's other half against it
            seconds = side.step()
            if number >= WARM:
                rounds[name].append(seconds)
    results.put((rank, rounds, traffic))
    dist.barrier()
    dist.destroy_process_group()


def measure(layouts: list[str]) -> tuple[dict[str, list[float]], dict[str, tuple[Traffic, Traffic]]]:
    """Seconds of each round, of its slower process; counted traffic and the formula's."""
    os.environ |= KEEP_MEMORY
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=serve, args=(rank, f"{folder}/store", layouts, results)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        answers = sorted((results.get(timeout=1800) for _ in processes), key=lambda answer: answer[0])
        for process in processes:
            process.join()
    slower = {name: [max(pair) for pair in zip(*(answer[1][name] for answer in answers))] for name in answers[0][1]}
    return slower, answers[0][2]


def main() -> None:
    layouts = sys.argv[1:] or list(LAYOUTS)
    rounds, traffic = measure(layouts)
    console, dims = (
        Console(width=110),
        {name: ParallelDims.from_config(config_of(name).parallel, RANKS) for name in layouts},
    )
    table = Table("", "s a step", "positions/s", "of two alone", title=f"{RANKS} processes of one thread")
    figures: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for name, seconds in rounds.items():
        share = statistics.median(alone / own for alone, own in zip(rounds["alone"], seconds))
        median = statistics.median(seconds)
        table.add_row(name, f"{median:.3f}", f"{RANKS * POSITIONS / median:,.0f}", f"{share:.3f}")
        figures[f"{name}_seconds"] = median
        if name in layouts:
            targets[f"{name}_share"] = target(share, SHARE)
    console.print(table)
    for name, (counted, formula) in traffic.items():
        console.print(counted.table(dims[name], f"{name}: a step of one rank, counted"))
        console.print(f"by axis: {counted.by_axis()}; formula: {formula.by_axis()}")
        figures[f"{name}_bytes"], figures[f"{name}_formula_bytes"] = counted.by_axis(), formula.by_axis()
        targets[f"{name}_bytes_as_formula"] = target(float(counted == formula), 1.0)
    print_result("scaling_gloo", figures, targets)


if __name__ == "__main__":
    main()
