"""One call of `mmoe train`: build or resume the run, train, evaluate, report.

A training process loads no reader, no preparation and no reporting: what is missing is prepared in a process of its
own, and what evaluates and draws is imported once the training has ended. That stays in this process: it has the model.
"""

import os
import re
from pathlib import Path

from mmoe.addresses import is_missing
from mmoe.commands.console import Console
from mmoe.commands.evaluate import show, watched_progress
from mmoe.commands.prepare import prepare_missing
from mmoe.commands.progress import ProgressBar
from mmoe.config.load import absolute, dump, flatten
from mmoe.errors import ConfigError
from mmoe.monitoring.metrics import MetricsWriter
from mmoe.monitoring.summary import METRICS
from mmoe.optional import status
from mmoe.parallel.mesh import check_one_process
from mmoe.recipe.config import RunConfig
from mmoe.runtime.agreement import Ranks
from mmoe.runtime.launch import first_alone, processes, same_config
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.training.callback import Callback
from mmoe.training.folder import check_start_over, start_over
from mmoe.training.lock import run_lock
from mmoe.training.run import Run, read_config
from mmoe.training.trainer import Trainer

# Keys that change no number of a step, so that a resumed run may change them. Where and when a sequence runs; what is
# kept and told of it; and where its files lie, since their contents are compared by themselves.
LAYOUT = r"parallel\..*|training\.micro_batch_sequences"
KEEPING = r"checkpoint\..*|monitoring\..*|evaluation\..*"
READING = r"data\.(workers|prefetch|error_budget|watchdog_seconds|storage\..*)"
PLACES = r"training\.run|data\.sources\.[^.]+\.(shards|input)|tokenizers\.(text|audio)\.path"
FREE = re.compile("|".join((LAYOUT, KEEPING, READING, PLACES)))


def train(config: RunConfig, console: Console, *, fresh: bool, stop_after: int | None, from_step: int | None) -> None:
    """Train to the end of the budget (or `stop_after` steps), then evaluate and report once the run is complete.

    Under torchrun every process calls this, and all of them evaluate the model as it is spread.
    """
    _check_options(fresh, from_step)
    folder = Path(config.training.run)
    with PeakMemory() as memory, processes(config.parallel.timeout_seconds, folder):
        check_one_process(config.parallel)
        same_config(dump(config))
        if fresh:
            first_alone(lambda: check_start_over(folder))  # before anything is prepared
        with run_lock(folder):
            voice = console if Ranks().rank == 0 else Console(quiet=True)
            run, complete = _train(config, voice, memory, fresh, stop_after, from_step)
        if complete and config.evaluation.at_end:
            _evaluate(run, voice)


def _train(
    config: RunConfig, console: Console, memory: PeakMemory, fresh: bool, stop_after: int | None, from_step: int | None
) -> tuple[Run, bool]:
    """The run, and whether it has had all its steps."""
    first_alone(lambda: _prepare(config))
    run = Run.build(config)
    if fresh:
        first_alone(lambda: start_over(run.folder))
    callbacks: list[Callback] = [MetricsWriter(memory), ProgressBar(console)]
    if config.evaluation.every_steps is not None:
        from mmoe.evaluation.callback import Evaluation

        callbacks.append(Evaluation(config.evaluation))
    trainer = Trainer(run, callbacks, stop_after)
    _introduce(run, console)
    if trainer.checkpoints.latest_step() is not None or from_step is not None:
        if run.folder.joinpath("checkpoints").is_dir():
            _check_same(run, console)
        trainer.resume(from_step)
        console.print(f"resumed {run.folder} at step {trainer.step}")
    elif config.training.start_from is not None:
        from mmoe.interchange.start import start

        start(run, config.training.start_from)
    elif (run.folder / METRICS).is_file():
        console.print(f"{run.folder} holds no checkpoint: the run begins at step 0", soft_wrap=True)
    first_alone(run.save_config)
    if trainer.step >= trainer.stop_at:
        console.print(f"{run.folder} has its {trainer.step} steps already; --fresh starts over")
    else:
        trainer.train()
    return run, trainer.step == trainer.last_step


def _prepare(config: RunConfig) -> None:
    """Prepare what is missing; whether what is there fits the config is for `Sources.check` to say."""
    sources, text = config.data.sources, config.tokenizers.text
    named = [*(source.shards for source in sources.values()), *([text.path] if text.path is not None else [])]
    if any(map(is_missing, named)):
        prepare_missing(sources, text)


def _evaluate(run: Run, console: Console) -> None:
    from mmoe.evaluation.evaluate import evaluate

    with watched_progress(run, console) as progress:
        result = evaluate(run, progress=progress)
    if result is not None:
        show(result, console)
    first_alone(lambda: _report(run, console))


def _report(run: Run, console: Console) -> None:
    if lack := status("plotly").reason:
        console.print(f"no report was written: {lack}", soft_wrap=True, highlight=False)
        return
    from mmoe.reporting.report import write_report  # plotly is an extra

    write_report(run)
    console.print(f"wrote {run.folder / 'report.html'}")


def _check_options(fresh: bool, from_step: int | None) -> None:
    """Raises ConfigError for options that exclude each other, and what torchrun would repeat at every restart."""
    if fresh and from_step is not None:
        raise ConfigError("--fresh deletes the checkpoints that --from-step resumes from; give one of them")
    option = "--fresh" if fresh else "--from-step" if from_step is not None else None
    if option and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError(
            f"{option} with torchrun --max-restarts would take the run back at every restart; begin with "
            "--max-restarts 0 and --stop-after, then start again without it"
        )


def _introduce(run: Run, console: Console) -> None:
    parameters = run.ranks.parameters(run.model)
    console.print(f"{run.folder}: {parameters:,} parameters on {run.device}, {run.tokenizers.vocabulary.size} ids")
    batch = run.config.batch_of(run.ranks.replicas)
    for table in (*run.ranks.tables(), batch.table(), run.config.optim.describe(batch)):
        console.print(table)


def _check_same(run: Run, console: Console) -> None:
    """A resumed run must be the run that was started; what may change (`FREE`) is said.

    Raises ConfigError naming every other key that differs.
    """
    saved = absolute(read_config(run.folder))  # earlier versions wrote addresses as they were given
    before, now = (flatten(c.model_dump(mode="json")) for c in (saved, run.config))
    differing = {
        key: f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if refused := [change for key, change in differing.items() if not FREE.fullmatch(key)]:
        raise ConfigError(
            f"{run.folder}/config.yaml differs from this config in {', '.join(refused)}; "
            "undo the change, set another training.run, or start over with --fresh"
        )
    if differing:
        console.print(f"{run.folder} goes on with other {', '.join(differing.values())}", soft_wrap=True)
