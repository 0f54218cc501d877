"""One call of `mmoe train`: build or resume the run, train, evaluate, report."""

import shutil

from rich.console import Console

from mmoe.config.load import load
from mmoe.config.tree import RunConfig
from mmoe.errors import ConfigError
from mmoe.evaluation.evaluate import evaluate, show
from mmoe.interchange.start import start
from mmoe.monitoring.memory import PeakMemory
from mmoe.monitoring.metrics import MetricsWriter
from mmoe.monitoring.progress import ProgressBar
from mmoe.monitoring.report import write_report
from mmoe.training.run import Run
from mmoe.training.trainer import Trainer


def train(config: RunConfig, console: Console, *, fresh: bool, stop_after: int | None, from_step: int | None) -> None:
    """Train to the end of the budget (or `stop_after` steps), then evaluate and report once the run is complete."""
    with PeakMemory() as memory:
        run = Run.build(config, console)
        if fresh and run.folder.exists():
            shutil.rmtree(run.folder)
        trainer = Trainer(run, [MetricsWriter(memory), ProgressBar(console)], stop_after)
        _introduce(run, console)
        if trainer.checkpoints.latest_step() is not None:
            _check_same(config, run)
            trainer.resume(from_step)
            console.print(f"resumed {run.folder} at step {trainer.step}")
        elif config.training.start_from is not None:
            start(run, config.training.start_from, console)
        run.save_config()
        if trainer.step >= trainer.stop_at:
            console.print(f"{run.folder} has its {trainer.step} steps already; --fresh starts over")
        else:
            trainer.train()
        if trainer.step == trainer.last_step and config.training.evaluate_at_end:
            show(evaluate(run), console)
            write_report(run)
            console.print(f"wrote {run.folder / 'report.html'}")


def _introduce(run: Run, console: Console) -> None:
    parameters = sum(p.numel() for p in run.model.parameters())
    console.print(f"{run.folder}: {parameters:,} parameters on {run.device}, {run.tokenizers.vocabulary.size} ids")
    console.print(run.config.batch.table())
    console.print(run.config.optim.describe(run.config.batch))


def _check_same(config: RunConfig, run: Run) -> None:
    """A resumed run must be the run that was started: only its folder's own config continues it exactly."""
    saved = load(RunConfig, run.folder / "config.yaml")
    if saved == config:
        return
    before, now = (dict(_flat(c.model_dump(mode="json"))) for c in (saved, config))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changes = ", ".join(f"{key} ({before.get(key)} -> {now.get(key)})" for key in changed)
    raise ConfigError(
        f"{run.folder}/config.yaml differs from this config in {changes}; "
        "undo the change, set another training.run, or start over with --fresh"
    )


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    items: list[tuple[str, object]] = []
    for key, value in tree.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return items
