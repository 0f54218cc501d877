"""Defines `mmoe evaluate`: it measures a run on held-out recordings, on one process or on all that torchrun starts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmoe.commands.arguments import Measured
from mmoe.commands.console import Console, console
from mmoe.commands.work_progress import evaluation_progress
from mmoe.errors import ConfigError

if TYPE_CHECKING:
    from mmoe.evaluation.inference import MeasureProgress
    from mmoe.schema.modality import Modality
    from mmoe.training.run import Run


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    overrides: Measured = None,
    shards: Annotated[str | None, typer.Option(help="another prepared source instead of the run's own")] = None,
    blank: Annotated[str | None, typer.Option(help="modality whose payload is zeroed: vision, audio, ...")] = None,
    shuffle: Annotated[str | None, typer.Option(help="modality taken from another held-out recording")] = None,
) -> None:
    """Measure a run on its held-out recordings; under torchrun, spread over the processes."""
    from mmoe.config.load import override
    from mmoe.evaluation.evaluate import evaluate as measure
    from mmoe.runtime.interrupt import answered
    from mmoe.runtime.launch import distributed_context, same_config
    from mmoe.training.run import UNWATCHED, Run, read_config

    blanked, shuffled = _modality(blank), _modality(shuffle)
    asked = {"RUN": str(folder), "overrides": overrides or [], "shards": shards, "blank": blank, "shuffle": shuffle}
    config = override(read_config(folder, UNWATCHED), overrides or ())
    with distributed_context(config.parallel.timeout_seconds, folder):
        same_config(json.dumps(asked))
        run = Run.load(folder, overrides=overrides or ())
        with answered(lambda: "stopping; again to kill"), watched_progress(run, console) as progress:
            result = measure(run, shards=shards, blank=blanked, shuffle=shuffled, progress=progress)
        if result is not None:
            show(result, console)


@contextmanager
def watched_progress(run: "Run", console: Console) -> Iterator["MeasureProgress"]:
    """Show how far an evaluation is, on the first rank, and stop it where its ranks do not go on together."""
    from mmoe.runtime.watch import StepWatchdog

    voice = console if run.ranks.first else Console(quiet=True)
    with (
        StepWatchdog(run.config.parallel.timeout_seconds, run.folder) as watch,
        evaluation_progress(voice, voice.is_terminal) as draw,
    ):

        def progress(what: str, done: int, of: int) -> None:
            watch.beat(done, f"evaluation: {what}")
            draw(what, done, of)

        yield progress


def _modality(name: str | None) -> "Modality | None":
    from mmoe.schema.modality import Modality

    if name is None:
        return None
    if name.upper() not in Modality.names:
        raise ConfigError(f"{name!r} is not a modality; choose from {', '.join(m.name.lower() for m in Modality)}")
    return Modality.named(name.upper())


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures of an evaluation as a table."""
    ablated = result["ablation"]
    title = f"{result['run']}, held out" + (f", {ablated['mode']} {ablated['modality']}" if ablated else "")
    table = Table("figure", "model", "beside", title=title, title_justify="left")
    for source, entries in result["ce_by_source"].items():
        for kind, entry in entries.items():
            gain = f" ({entry['ce'] / entry['unigram'] - 1:+.0%})" if entry["unigram"] > 0 else ""
            table.add_row(f"CE of {kind}, {source}", f"{entry['ce']:.3f}", f"unigram {entry['unigram']:.3f}{gain}")
    for source, errors in result["actions"].get("by_source", {}).items():
        beside = ", ".join(f"{who} {errors[who]:.4f}" for who in ("mean", "hold_last", "ridge"))
        table.add_row(f"action error, {source}", f"{errors['model']:.4f}", beside)
    for source, dimensions in result["categories"].items():
        for name, entry in dimensions.items():
            beside = f"always {entry['frequent']} {entry['most_frequent']:.3f}, {entry['labels']} labels"
            table.add_row(f"accuracy of {name}, {source}", f"{entry['accuracy']:.3f}", beside)
    for name, entry in result["retrieval"]["by"].items():
        pool = entry if entry["r1"] is not None else entry["smaller_pool"]
        if pool is None:
            table.add_row(f"retrieval, {name}", "-", entry["reason"])
            continue
        beside = f"low {pool['r1_low']:.3f}, recall@5 {pool['r5']:.3f}, chance {pool['chance']:.3f}"
        table.add_row(f"recall@1 of {pool['pool']}, {name}", f"{pool['r1']:.3f}", beside)
    for source, entry in result["ranking"].items():
        for score, share in entry.get("accuracy", {}).items():
            beside = f"low {entry['low'][score]:.3f}, chance {entry['chance']:.3f}, {entry['rows']} rows"
            table.add_row(f"ranking by {score}, {source}", f"{share:.3f}", beside)
    for name, reason in result["not_evaluated"].items():
        table.add_row(name, "-", reason)
    console.print(table)
    for name, samples in result["samples"].items():
        if 0 < samples["evaluated"] < samples["held_out"]:
            bound = result["max_documents"]
            why = f"; evaluation.max_documents is {bound:,}" if bound and bound < samples["held_out"] else ""
            said = f"{name}: {samples['evaluated']:,} of {samples['held_out']:,} held-out samples were measured{why}"
            console.print(said, highlight=False, soft_wrap=True)
