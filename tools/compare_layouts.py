"""Does this config compute the same in every layout? The first step of its real data, against one process.

    python tools/compare_layouts.py configs/demo.yaml --layouts dp2 tp2 ep2 pp2 cp2
    python tools/compare_layouts.py configs/demo.yaml model.n_layers=2 --layouts ep2,tp2 hsdp2,dp2 --precision float64

A layout is a comma-separated list of degrees: dp (parallel.dp_shard), hsdp (dp_replicate), tp, cp, pp, ep. It takes
as many processes of this machine as dp x hsdp x tp x cp x pp; ep borrows from dp, cp and tp, and raises dp where none
is given. Loss, gradient norm and the gradient of each parameter family (its name without layer numbers) are compared
by their relative difference. The exit status is 1 where a layout differs from one process, or cannot be taken.

The step is that of the config but for what would hide or forge a difference: float32 (or --precision) instead of its
own, in float64 with the `loop` engine; no compilation, no data workers, a micro-batch that all layouts can take; the
balance losses of a micro-step are left out, since they mean something else in each layout (it says so).
Everything runs on the CPU, and nothing is written to the run's folder.
"""

import argparse
import logging
import math
import os
import queue
import re
import sys
import tempfile
import traceback
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table
from rich.text import Text
from torch.distributed.tensor import DTensor

from mmoe.commands.console import Console, show_record
from mmoe.commands.prepare import prepare_and_show
from mmoe.config.load import load, merge, validate
from mmoe.errors import ConfigError, MmoeError
from mmoe.preparation.ensure_prepared import ensure_prepared
from mmoe.recipe.config import RunConfig
from mmoe.recipe.resolved import ResolvedRun
from mmoe.result import print_result, target
from mmoe.runtime.logging import set_up_logging
from mmoe.training.gradients import step_gradients
from mmoe.training.loop import Trainer
from mmoe.training.run import Run

AXES = {"dp": "dp_shard", "hsdp": "dp_replicate", "tp": "tp", "cp": "cp", "pp": "pp", "ep": "ep"}
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
PERIOD_SECONDS = 0.5

console = Console()


@dataclass(frozen=True)
class Layout:
    """One layout as it was named; `config` is the run's with its degrees and a micro-batch that they divide."""

    name: str
    config: RunConfig
    processes: int

    @property
    def replicas(self) -> int:
        return self.config.parallel.dp_shard * self.config.parallel.dp_replicate


@dataclass(frozen=True)
class Outcome:
    """What one rank found. `squares` has for each parameter here the sums of squares of its gradient's difference
    from the reference and of the reference; `loads` the choices of each expert by layer."""

    loss: float
    norm: float
    loads: np.ndarray | None
    squares: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Relative differences; `moved` router choices fell on another expert."""

    loss: float
    norm: float
    families: dict[str, float]
    moved: int

    @property
    def worst(self) -> float:
        """NaN where any of them is."""
        return float(torch.tensor([self.loss, self.norm, *self.families.values()], dtype=torch.float64).max())


def main() -> None:
    arguments = parse()
    set_up_logging(show_record)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes to come
    try:
        reference, layouts, refused = plan(arguments)
        compared = compare(reference, layouts)
    except MmoeError as error:
        Console(stderr=True).print(Text("error", "bold red"), str(error), highlight=False, soft_wrap=True)
        sys.exit(1)
    tolerance = arguments.tolerance or TOLERANCE[arguments.precision]
    show(layouts, compared, refused, arguments.precision, tolerance)
    errors = refused | {name: found for name, found in compared.items() if isinstance(found, str)}
    found = {name: found for name, found in compared.items() if isinstance(found, Comparison)}
    figures = {
        name: {"loss": one.loss, "grad_norm": one.norm, "gradients": one.families, "moved_choices": one.moved}
        for name, one in found.items()
    }
    targets = {name: target(one.worst, tolerance, at_most=True) for name, one in found.items()}
    print_result(
        "compare_layouts", {"precision": arguments.precision, "layouts": figures, "not_compared": errors}, targets
    )
    sys.exit(bool(errors) or not all(each["ok"] for each in targets.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. model.n_layers=2")
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help="e.g. dp2 tp2 ep2,dp2")
    parser.add_argument("--precision", choices=TOLERANCE, default="float32", help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, help="relative; default: 1e-5 in float32, 1e-11 in float64")
    arguments = parser.parse_args()
    arguments.overrides += [item for item in arguments.layouts if "=" in item]  # they may stand behind the layouts
    arguments.layouts = list(dict.fromkeys(item for item in arguments.layouts if "=" not in item))
    if not arguments.layouts:
        parser.error("--layouts names none, e.g. --layouts dp2 tp2")
    return arguments


def plan(arguments: argparse.Namespace) -> tuple[RunConfig, list[Layout], dict[str, str]]:
    """The config of the one process, the layouts, and why those that the config cannot take are refused."""
    config = load(RunConfig, arguments.config, arguments.overrides)
    single = dict.fromkeys(AXES.values(), 1) | {"schedule": "1f1b", "stages_per_rank": 1}
    changes: dict[str, Any] = {
        "precision": {"compute": arguments.precision},
        "parallel": single | {"compile": False},
        "data": {"workers": 0},  # the processes here may have no children
    }
    if levels := [level for level in ("micro_batch", "global_batch") if getattr(config.losses.load_balance, level)]:
        for level in levels:
            console.print(
                Text(f"losses.load_balance.{level}", "bold"),
                "is set to 0: it depends on how a step is cut into micro-batches",
                highlight=False,
                soft_wrap=True,
            )
        changes = merge(changes, {"losses": {"load_balance": dict.fromkeys(levels, 0.0)}})
    if config.model.moe is not None and arguments.precision == "float64":
        changes = merge(changes, {"model": {"moe": {"expert_backend": "loop"}}})
    reference = changed(config, changes)
    layouts, refused = [], {}
    for name in arguments.layouts:
        dims = read_layout(name)
        try:
            layouts.append(layout_of(name, reference, dims, config))
        except ConfigError as error:
            refused[name] = str(error)
    return reference, layouts, refused


def read_layout(name: str) -> dict[str, int]:
    """``ep2,dp2`` -> {"ep": 2, "dp": 2}. Raises ConfigError where it is no list of degrees."""
    dims: dict[str, int] = {}
    for part in name.split(","):
        match = re.fullmatch(r"([a-z]+)([1-9]\d*)", part)
        if match is None or match[1] not in AXES or match[1] in dims:
            raise ConfigError(
                f"--layouts {name}: {part!r} is not one more degree; a layout is a comma-separated list of "
                f"{', '.join(AXES)} with a number behind each, e.g. ep2,dp2"
            )
        dims[match[1]] = int(match[2])
    return dims


def layout_of(name: str, reference: RunConfig, dims: dict[str, int], config: RunConfig) -> Layout:
    """Raises ConfigError where the run cannot be spread over these degrees."""
    shared = dims.get("cp", 1) * dims.get("tp", 1)
    ep = dims.get("ep", 1)
    dims = {"dp": ep // math.gcd(ep, shared)} | dims
    processes = math.prod(degree for axis, degree in dims.items() if axis != "ep")
    parallel: dict[str, Any] = {AXES[axis]: degree for axis, degree in dims.items()}
    if "pp" in dims:
        parallel |= {"schedule": config.parallel.schedule, "stages_per_rank": config.parallel.stages_per_rank}
    changes: dict[str, Any] = {"parallel": parallel}
    micro, share = reference.training.micro_batch_sequences, reference.batch.sequences
    share //= dims["dp"] * dims.get("hsdp", 1)
    if micro is not None and share:
        changes["training"] = {"micro_batch_sequences": max(n for n in range(1, micro + 1) if share % n == 0)}
    found = changed(reference, changes)
    ResolvedRun.from_config(found, processes)
    return Layout(name, found, processes)


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, merge(config.model_dump(mode="json"), changes), "compare_layouts")


def compare(reference: RunConfig, layouts: list[Layout]) -> dict[str, Comparison | str]:
    """By layout; a text says why its processes did not come to an end."""
    # Here: processes of `start` may have no children, which preparing may need.
    ensure_prepared(reference.data.sources, reference.tokenizers.text, prepare_and_show)
    with tempfile.TemporaryDirectory(prefix="mmoe-layouts-") as folder:
        with console.status("one process"):
            answer = start(Layout("one process", reference, 1), Path(folder))
        if isinstance(answer, str):
            raise MmoeError(f"the step of one process failed: {answer}")
        single = answer[0]
        console.print(f"one process: loss {single.loss:.6f}, gradient norm {single.norm:.6f}", highlight=False)
        compared: dict[str, Comparison | str] = {}
        for layout in layouts:
            with console.status(f"{layout.name}: {layout.processes} processes"):
                answer = start(layout, Path(folder))
            compared[layout.name] = answer if isinstance(answer, str) else against(single, answer)
    return compared


def against(single: Outcome, ranks: list[Outcome]) -> Comparison:
    """Every rank reports the same loss and norm, and the parameters that it has a part of."""
    squares: dict[str, tuple[float, float]] = {}
    for outcome in ranks:
        for name, (difference, size) in outcome.squares.items():
            squares[name] = max(squares.get(name, (0.0, 0.0)), (difference, size))
    families: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, (_, size) in single.squares.items():
        families[family(name)].append(squares.get(name, (math.inf, size)))
    moved = 0 if single.loads is None else max(int(np.abs(one.loads - single.loads).sum()) // 2 for one in ranks)
    return Comparison(
        loss=max(relative(abs(one.loss - single.loss), abs(single.loss)) for one in ranks),
        norm=max(relative(abs(one.norm - single.norm), single.norm) for one in ranks),
        families={
            name: relative(math.sqrt(sum(d for d, _ in pairs)), math.sqrt(sum(s for _, s in pairs)))
            for name, pairs in families.items()
        },
        moved=moved,
    )


def family(name: str) -> str:
    """The parameter's name without the numbers of its layer and expert."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def relative(difference: float, size: float) -> float:
    if size == 0:
        return difference if difference == 0 else math.inf
    return difference / size


def start(layout: Layout, folder: Path) -> list[Outcome] | str:
    """The outcome of every rank, or why there is none."""
    context = mp.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=work, args=(layout, rank, folder, answers), daemon=True)
        for rank in range(layout.processes)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, Outcome] = {}
    try:
        while len(outcomes) < layout.processes:
            ended = [rank for rank, process in enumerate(processes) if not process.is_alive()]
            try:
                rank, outcome = answers.get(timeout=PERIOD_SECONDS)
            except queue.Empty:
                if silent := [rank for rank in ended if rank not in outcomes]:
                    return f"rank {silent[0]} ended without an answer (status {processes[silent[0]].exitcode})"
                continue
            if isinstance(outcome, str):
                return f"rank {rank}: {outcome}"
            outcomes[rank] = outcome
    finally:
        for process in processes:
            process.kill()
    return [outcomes[rank] for rank in range(layout.processes)]


def work(layout: Layout, rank: int, folder: Path, answers: Any) -> None:
    """One process: rank `rank` of `layout`, or the one of the reference, which leaves its gradients in `folder`."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // layout.processes))
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how it gathers a gradient
    try:
        if layout.processes > 1:
            dist.init_process_group(
                "cpu:gloo",
                store=dist.FileStore(str(folder / f"store-{layout.name}"), layout.processes),
                rank=rank,
                world_size=layout.processes,
                timeout=timedelta(seconds=layout.config.parallel.timeout_seconds),
            )
        answers.put((rank, take_step(layout, folder)))
    except MmoeError as error:
        answers.put((rank, str(error)))
    except Exception:
        answers.put((rank, traceback.format_exc()))


def take_step(layout: Layout, folder: Path) -> Outcome:
    """The gradients of the first step, compared with those of one process."""
    config = layout.config
    run = replace(Run.build(config), folder=folder / layout.name)
    trainer = Trainer(run, [])
    data = next(run.ranks.steps(trainer.state.stream, trainer.batch.accumulation))
    denominators = trainer.setting.terms.denominators(data.counts, trainer.batch.sequences)
    step = step_gradients(run.model.train(), data.batches, denominators, trainer.setting, config.training.seed)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    path = folder / "gradients.pt"
    if layout.processes == 1:
        torch.save(gradients, path)
    expected = torch.load(path, mmap=True)
    squares = {}
    for name, gradient in gradients.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        size = expected[name].double() if name in expected else torch.zeros(())
        squares[name] = (float((whole.double() - size).square().sum()), float(size.square().sum()))
    loads = None if step.routing is None else step.routing.load_NMSE.sum((1, 2)).numpy()
    return Outcome(float(step.report.loss), float(step.norm), loads, squares)


def show(
    layouts: list[Layout],
    compared: dict[str, Comparison | str],
    refused: dict[str, str],
    precision: str,
    tolerance: float,
) -> None:
    def cell(difference: float) -> Text:
        return Text(f"{difference:.1e}", "green" if difference <= tolerance else "red")

    done = [(one, compared[one.name]) for one in layouts if isinstance(compared[one.name], Comparison)]
    title = f"relative differences from one process in {precision}; at most {tolerance:g}"
    table = Table("gradients of", *(one.name for one, _ in done), title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify, column.min_width = "right", 7
    for name in next((found.families for _, found in done), ()):
        short = name.removeprefix("decoder.").removesuffix(".weight")
        table.add_row(short, *(cell(found.families[name]) for _, found in done))
    table.add_section()
    batches = [one.config.batch_of(one.replicas) for one, _ in done]
    rows = {
        "norm of all gradients": [cell(found.norm) for _, found in done],
        "loss": [cell(found.loss) for _, found in done],
        "router choices that moved": [str(found.moved) for _, found in done],
        "processes": [str(one.processes) for one, _ in done],
        "micro-batches of sequences": [f"{b.accumulation} of {b.micro_batch_sequences}" for b in batches],
        "": [
            Text("ok", "bold green") if found.worst <= tolerance else Text("differs", "bold red") for _, found in done
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    if done:
        console.print(table)
    failed = {name: found for name, found in compared.items() if isinstance(found, str)}
    for verdict, errors in (("refused", refused), ("failed", failed)):
        for name, sentence in errors.items():
            console.print(Text(f"{name} {verdict}", "bold red"), sentence, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
