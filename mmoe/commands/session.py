"""Runs one call of `mmoe train`: build or resume the run, train, evaluate, report.

A training process loads no reader, no preparation and no reporting: what is missing is prepared in a process of its
own, and what evaluates and draws is imported once the training has ended. That stays in this process: it has the model.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmoe.addresses import is_missing
from mmoe.commands.console import Console
from mmoe.commands.evaluate import show, watched_progress
from mmoe.commands.prepare import prepare_missing
from mmoe.commands.progress import Progress
from mmoe.commands.work_progress import evaluation_progress
from mmoe.config.load import dump
from mmoe.data.plan.mixture import Mixture
from mmoe.data.plan.prepared import sizes
from mmoe.errors import ConfigError
from mmoe.monitoring.metrics import MetricsCallback
from mmoe.monitoring.sinks.jsonl import METRICS
from mmoe.optional import status
from mmoe.parallel.mesh import check_one_process
from mmoe.recipe.config import RunConfig
from mmoe.runtime.agreement import ProcessGroupRanks
from mmoe.runtime.interrupt import answered
from mmoe.runtime.launch import distributed_context, rank_zero_first, same_config, strongest
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.runtime.provenance import record_provenance
from mmoe.training.callback import Callback
from mmoe.training.changes import History, record_changes
from mmoe.training.folder import check_start_over, start_over
from mmoe.training.lock import run_lock
from mmoe.training.loop import Trainer
from mmoe.training.resume import adjust, check_resume
from mmoe.training.run import Run


def train(
    config: RunConfig,
    console: Console,
    *,
    fresh: bool,
    stop_after: int | None,
    from_step: int | None,
    adjustments: Sequence[str] = (),
) -> int:
    """Train to the end of the budget (or `stop_after` steps), then evaluate and report once the run is complete.

    Gives the number of the signal that has interrupted it, saved, or 0.
    `adjustments` (`--set`, ``key=value``) change the rate of a run that has steps already, and are recorded. Under
    torchrun every process calls this, and all of them evaluate the model as it is spread.
    """
    _check_options(fresh, from_step, adjustments)
    config = adjust(config, adjustments)
    folder = Path(config.training.run)
    with PeakMemory() as memory, distributed_context(config.parallel.timeout_seconds, folder):
        check_one_process(config.parallel)
        options = {"fresh": fresh, "stop_after": stop_after, "from_step": from_step, "set": list(adjustments)}
        same_config(f"{dump(config)}options: {json.dumps(options)}\n")
        if fresh:
            rank_zero_first(lambda: check_start_over(folder))  # before anything is prepared
        with run_lock(folder):
            voice = console if ProcessGroupRanks().rank == 0 else Console(quiet=True)
            trainer = _train(config, voice, memory, fresh, stop_after, from_step, adjustments)
        complete = trainer.state.step == trainer.last_step
        if complete and config.evaluation.at_end and not trainer.interrupted:
            with answered(lambda: f"stopping; {folder} is trained, and the same command evaluates it; again to kill"):
                _evaluate(trainer.run, voice)
    return trainer.interrupted


def _train(
    config: RunConfig,
    console: Console,
    memory: PeakMemory,
    fresh: bool,
    stop_after: int | None,
    from_step: int | None,
    adjustments: Sequence[str],
) -> Trainer:
    rank_zero_first(lambda: _prepare(config))
    run = Run.build(config)
    if fresh:
        rank_zero_first(lambda: start_over(run.folder))
    callbacks: list[Callback] = [callback.build() for callback in config.training.callbacks]
    if config.evaluation.every_steps is not None:
        from mmoe.evaluation.callback import Evaluation

        # lines, on a terminal too: the bar of the training stands there
        callbacks.append(Evaluation(config.evaluation, partial(evaluation_progress, console, drawn=False)))
    progress = Progress(console)
    metrics = MetricsCallback(memory, progress.tell)
    trainer = Trainer(run, [*callbacks, metrics, progress], stop_after)
    _introduce(run, console)
    if from_step is not None or trainer.checkpoints.latest_step() is not None:
        _resume(run, trainer, from_step, adjustments, console)
    elif adjustments:
        raise ConfigError(
            f"--set changes a run that has steps, and {run.folder} has no checkpoint; give {', '.join(adjustments)} "
            "without --set"
        )
    elif config.training.start_from is not None:
        from mmoe.interchange.start import start

        start(run, config.training.start_from)
    elif (run.folder / METRICS).is_file():
        console.print(f"{run.folder} holds no checkpoint: the run begins at step 0", soft_wrap=True)
    rank_zero_first(run.save_config)
    if trainer.state.step < trainer.stop_at:
        state = trainer.state
        rank_zero_first(lambda: record_provenance(run.folder, state.session, state.step, state.data))
        trainer.train()
        return trainer
    instead = "a larger training.budget_positions extends it, --fresh starts over"
    if trainer.stop_at < trainer.last_step:
        instead = f"--stop-after {trainer.stop_at} leaves none to do; a later one goes on"
    console.print(f"{run.folder} has its {trainer.state.step} steps already; {instead}", soft_wrap=True)
    if strongest(metrics.unwritten)[0]:
        trainer.write_rest()
    return trainer


def _resume(run: Run, trainer: Trainer, from_step: int | None, adjustments: Sequence[str], console: Console) -> None:
    """Go on from `from_step`, or from the newest whole checkpoint; what changes is said, and recorded."""
    if not run.folder.joinpath("checkpoints").is_dir():
        trainer.resume(from_step)  # says what there is not

    def mixture(config: RunConfig) -> Mixture:
        found = sizes(config.data, run.sources.manifests, run.tokenizers)
        return Mixture(config.data.stages, found, config.training.budget_positions)

    history = History.read(run.folder)

    def check(step: int) -> None:
        for sentence in check_resume(history, run.config, step, mixture, adjustments):
            console.print(sentence, soft_wrap=True)

    trainer.resume(from_step, check)
    rank_zero_first(lambda: record_changes(history, trainer.state.step, run.config))
    console.print(f"resumed {run.folder} at step {trainer.state.step}")


def _prepare(config: RunConfig) -> None:
    """Prepare what is missing; whether what is there fits the config is for `PreparedSources.check` to say."""
    sources, text = config.data.sources, config.tokenizers.text
    named = [*(source.shards for source in sources.values()), *([text.path] if text.path is not None else [])]
    if any(map(is_missing, named)):
        prepare_missing(sources, text, config.extensions)


def _evaluate(run: Run, console: Console) -> None:
    from mmoe.evaluation.evaluate import evaluate

    if any(manifest.holds_out for manifest in run.sources.manifests.values()):
        with watched_progress(run, console) as progress:
            result = evaluate(run, progress=progress)
        if result is not None:
            show(result, console)
    else:
        console.print("nothing is evaluated: no source has held-out samples (prepare.heldout_share)", soft_wrap=True)
    rank_zero_first(lambda: _report(run, console))


def _report(run: Run, console: Console) -> None:
    if lack := status("plotly").reason:
        console.print(f"no report was written: {lack}", soft_wrap=True, highlight=False)
        return
    from mmoe.reporting.report import write_report  # plotly is an extra

    write_report(run)
    console.print(f"wrote {run.folder / 'report.html'}")


def _check_options(fresh: bool, from_step: int | None, adjustments: Sequence[str]) -> None:
    """Raises ConfigError for options that exclude each other, and what torchrun would repeat at every restart."""
    if fresh and from_step is not None:
        raise ConfigError("--fresh deletes the checkpoints that --from-step resumes from; give one of them")
    if fresh and adjustments:
        raise ConfigError(f"--set changes a run on its way, --fresh begins one; give {adjustments[0]} without --set")
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
