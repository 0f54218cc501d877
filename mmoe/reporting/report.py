"""Writes `report.html`, one self-contained page on a run, and `summary.json` beside it."""

from functools import partial
from typing import Any

import torch
from markupsafe import Markup

from mmoe.config.load import dump
from mmoe.files import write_atomically, writes
from mmoe.models.decoder import MultimodalModel
from mmoe.monitoring.summary import RunRecords, summarize, write_summary
from mmoe.planning.capacity import LAST, advise
from mmoe.reporting import figures
from mmoe.reporting.images import read_slice, slice_card
from mmoe.reporting.page import Section, page, parts, plot
from mmoe.runtime.provenance import read_provenance
from mmoe.training.run import RunView, model_inputs

REPORT = "report.html"

_plot = partial(plot, responsive=True, displayModeBar=False)

TRAINING = {
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "packing_efficiency": "packing efficiency",
    "tokens_per_second": "tokens per second, without padding",
    "data_wait_seconds": "seconds a step waits for data",
    "mfu": "model FLOPs utilization",
}


def write_report(run: RunView) -> None:
    """Write ``summary.json`` and ``report.html`` into the run's folder, from its metrics and evaluations.

    Images of sample slices are read from the held-out shards. Raises DataError where no step was recorded.
    """
    write_summary(run.folder)
    html = render_report(run, RunRecords.read(run.folder))
    with writes(run.folder / REPORT):
        write_atomically(run.folder / REPORT, html)


def render_report(run: RunView, records: RunRecords) -> str:
    """Render the report of a run as a page of HTML."""
    summary = summarize(records)
    sections = [_training(run, records), _experts(run, records)]
    if records.plain:
        sections += [
            _actions(records),
            _retrieval(records),
            _texts(records),
            _slices(run, records),
            _evaluations(records),
        ]
    sections += [_data(run, records), _sessions(run), _config(run)]
    cards = [parts.card(*card) for card in key_figures(summary)]
    return page(str(run.folder), _lead(run, summary), cards, filter(None, sections))


def key_figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List (label, value, what to hold it against) of the figures at the head of the page; only what was measured."""
    cards = []
    if summary["action_mse"] is not None:
        mse, baselines = summary["action_mse"], summary["action_mse_baselines"]
        ratio = f"{mse / baselines['mean']:.2f} x training mean" if baselines["mean"] else ""
        cards.append(("action error", f"{mse:.4f}", f"{ratio}; ridge {baselines['ridge']:.4f}"))
        for key, value in summary.items():
            if key.startswith("action_mse_") and key != "action_mse_baselines" and value is not None:
                name = key.removeprefix("action_mse_").replace("_", " ")
                cards.append(
                    (f"action error, {name}", f"{value:.4f}", f"{value / mse:.1f} x with sight" if mse else "")
                )
    retrieval = summary["retrieval"]
    if retrieval["r1"] is not None:
        beside = f"lower bound {retrieval['r1_low']:.3f}, chance {1 / retrieval['pool']:.3f}"
        cards.append((f"recall@1 of {retrieval['pool']}", f"{retrieval['r1']:.3f}", beside))
    for kind, ce in (summary["val_ce"] or {}).items():
        if kind != "structure":
            cards.append((f"CE of {kind}", f"{ce:.3f}", f"unigram {summary['unigram_ce'][kind]:.3f} nats"))
    cards.append(("packing efficiency", f"{summary['packing_efficiency']:.2%}", "useful of all positions"))
    if summary["drop_rate"] is not None:
        cards.append(("dropped by experts", f"{summary['drop_rate']:.3%}", "of their choices"))
    exact = {True: "bit for bit", False: "differs", None: "not checked"}[summary["resume_exact"]]
    cards.append(("resume", exact, "a repeated step against its first run"))
    cards.append(("speed", f"{summary['tokens_per_second']:,.0f}", "tokens per second, without padding"))
    if summary["mfu"] is not None:
        cards.append(("MFU", f"{summary['mfu']:.1%}", f"of {summary['mfu_peak_flops'] / 1e12:,.0f} TFLOP/s a device"))
    cards.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB", "PSS of the process tree"))
    cards.append(("training time", f"{summary['wall_seconds']:,.0f} s", f"{summary['steps']:,} steps"))
    return cards


def _training(run: RunView, records: RunRecords) -> Section | None:
    terms = {"loss": "total"} | {f"loss_{term.name}": term.title or term.name for term in run.resolved.loss_terms}
    columns = records.reader.columns(*terms, *TRAINING)
    return "Training", (
        parts.heading("Loss terms")
        + parts.note("Each before its weight; sums over items divided by the planned counts of the step.")
        + _plot(figures.curves(columns, terms, 3))
        + parts.heading("Optimization and throughput")
        + _plot(figures.curves(columns, TRAINING, 2))
    )


def _experts(run: RunView, records: RunRecords) -> Section | None:
    reader = records.reader
    load, gradients = (figures.over_even(reader.tables(name)) for name in ("expert_load", "router_grad_norm"))
    if load is None:
        return None
    note = "Choices of each expert over an even share, before any drop, counted between two records."
    shown = [parts.note(note), _plot(load)]
    if gradients is not None:
        note = "Norm of the gradient of each expert's router weights over the mean of its layer, before clipping."
        shown += [parts.heading("Router gradients"), parts.note(note), _plot(gradients)]
    if "would_drop" in reader.table_names():
        model, length, precision = run.config.model, run.config.data.sequence_length, run.config.precision
        advice = advise(reader, model, length, precision, LAST)
        note = (
            f"What a capacity for each sequence would have dropped of the choices of steps {advice.first} to "
            f"{advice.last}; tools/capacity_advisor.py tells what each factor costs."
        )
        shown += [parts.heading("Capacity"), parts.note(note), _plot(figures.would_drop(advice))]
    return "Expert load", Markup().join(shown)


def _actions(records: RunRecords) -> Section | None:
    figure = figures.action_errors(records.evaluations)
    if figure is None:
        return None
    facts = records.plain["actions"]
    note = (
        f"{facts['chunks']} held-out chunks. Hold-last falls back to the training mean for the "
        f"{facts['hold_last_without_history']} chunks before which nothing was logged. The ridge reads every input "
        "but the images."
    )
    shown = [parts.note(note), _plot(figure)]
    ablated = {
        name: evaluation["examples"]
        for name, evaluation in records.evaluations.items()
        if evaluation["ablation"] and evaluation["ablation"]["mode"] == "shuffle" and not evaluation["shards"]
    }
    for source, examples in records.plain["examples"].items():
        others = {name: sources[source] for name, sources in ablated.items() if source in sources}
        shown.append(parts.heading(f"{source}: predicted against logged {examples['names'][0]}"))
        shown.append(parts.note("The first step of every chunk over the longest held-out recordings, in logged units."))
        shown.append(_plot(figures.trace(examples, others, 0)))
        shown.append(_plot(figures.scatter(examples)))
    return "Actions", Markup().join(shown)


def _retrieval(records: RunRecords) -> Section | None:
    figure = figures.retrieval(records.evaluations)
    if figure is None:
        return None
    reasons = {
        f"{name}: {entry['reason']}" for name, entry in records.plain["retrieval"]["by"].items() if entry["r1"] is None
    }
    note = "Isolated pairs in ten seeded pools with different captions, the mean of both directions. "
    return "Retrieval", parts.note(note + " ".join(sorted(reasons))) + _plot(figure)


def _texts(records: RunRecords) -> Section | None:
    figure = figures.cross_entropy_bars(records.plain)
    shown = [] if figure is None else [_plot(figure)]
    ranking = records.plain["ranking"]
    if ranking:
        rows = [
            [
                source,
                entry["rows"],
                entry["candidates"],
                f"{entry['chance']:.3f}",
                *(f"{entry['accuracy'][score]:.3f} (low {entry['low'][score]:.3f})" for score in entry["accuracy"]),
            ]
            for source, entry in ranking.items()
            if entry["rows"]
        ]
        heads = ["source", "rows", "candidates", "chance", "by ln p", "by ln p per token", "by PMI"]
        shown += [parts.heading("Which text fits the audio or image best"), parts.table(heads, rows)]
    return "Cross-entropy and ranking", Markup().join(shown)


def _slices(run: RunView, records: RunRecords) -> Section | None:
    cards = [
        slice_card(item, examples["names"], read_slice(run, source, item["shard"], item["row"], item["chunk"]))
        for source, examples in records.plain["examples"].items()
        for item in examples["slices"]
    ]
    return ("Held-out slices", parts.slices(Markup().join(cards))) if cards else None


def _evaluations(records: RunRecords) -> Section | None:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = []
    for name, evaluation in records.evaluations.items():
        samples = sum(entry["evaluated"] for entry in evaluation["samples"].values())
        left_out = "; ".join(f"{source}: {reason}" for source, reason in evaluation["not_evaluated"].items())
        kinds = [evaluation["val_ce"].get(kind) for kind in ("text", "audio")]
        figures_of = [evaluation["action_mse"], evaluation["retrieval"]["r1"], *kinds]
        rows.append([name or "plain", samples, *map(figure, figures_of), left_out])
    heads = ["evaluation", "samples", "action error", "recall@1", "CE text", "CE audio", "not evaluated"]
    return "Evaluations", parts.table(heads, rows)


def _data(run: RunView, records: RunRecords) -> Section | None:
    last = records.reader.last()
    lost, planned, served, bad = (
        {key.partition("/")[2]: value for key, value in last.items() if key.startswith(f"{kind}/")}
        for kind in ("lost", "planned_positions", "served_positions", "quarantined")
    )
    rows = []
    for name, manifest in run.sources.manifests.items():
        counts = [manifest.splits[s].samples if s in manifest.splits else 0 for s in ("train", "heldout")]
        mine = {key.removeprefix(f"{name}/"): n for key, n in lost.items() if key.startswith(f"{name}/")}
        refused = ", ".join(f"{n} {reason}" for reason, n in (manifest.quarantined | manifest.removed).items())
        shares = [f"{of[name] / max(sum(of.values()), 1):.2%}" if name in of else "-" for of in (planned, served)]
        lines = [f"{n} {r}" for r, n in mine.items()]
        if name in bad:
            lines.append(f"{bad[name]} could not be decoded")
        rows.append([name, manifest.kind, *counts, *shares, ", ".join(lines), refused])
    heads = ["source", "kind", "training", "held out", "planned share", "served", "cut, dropped or lost", "refused"]
    return "Data", parts.table(heads, rows)


def _sessions(run: RunView) -> Section | None:
    """Where the numbers come from: a row for each call of `mmoe train`."""
    rows = []
    lines, left_out = read_provenance(run.folder)
    for line in lines:
        code, found = line["code"], line["versions"]
        commit = "of no repository"
        if code["commit"]:
            commit = code["commit"][:12] + {True: ", changed", None: ", changed or not", False: ""}[code["dirty"]]
        versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "CUDA") if found.get(name))
        where = f"{line['ranks']} on {line['host']}" + (", ..." if line["machines"] > 1 else "")
        rows.append([line["session"], line["step"], line["time"], commit, versions, where, line["command"]])
    heads = ["session", "from step", "begun", "commit", "versions", "ranks", "command"]
    notes = map(parts.note, left_out)
    return ("Sessions", Markup().join([parts.table(heads, rows), *notes])) if rows or left_out else None


def _config(run: RunView) -> Section | None:
    return "Configuration", parts.details("the resolved tree", dump(run.config))


def _lead(run: RunView, summary: dict[str, Any]) -> str:
    with torch.device("meta"):  # what is here of the model may be a part of it
        inputs = model_inputs(run.tokenizers)
        model = MultimodalModel(run.config.model, inputs, run.resolved.heads(inputs))
    parameters = sum(p.numel() for p in model.parameters())
    sources = ", ".join(run.sources.names)
    return f"{parameters:,} parameters, {summary['positions']:,} positions of {sources}"
