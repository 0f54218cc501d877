"""Draws the figures of a run's report, each by a function from records to a plotly figure."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mmoe.monitoring.tables import TableChunk
from mmoe.planning.capacity import LIMIT, CapacityAdvice

INK, MUTED, GRID = "#1b2430", "#5f6b7a", "#e6eaf0"
MODEL, ABLATED, BLANKED = "#1f5fbf", "#d9772b", "#e3ab4f"
BASELINES = {"mean": "#c3cad4", "hold_last": "#98a3b2", "ridge": "#66717f"}
BASELINE_NAMES = {"mean": "training mean", "hold_last": "hold last action", "ridge": "ridge, non-visual"}
# Load over its even share: blue is idle, white even, orange overloaded.
LOAD_SCALE = [(0.0, "#1f5fbf"), (0.5, "#ffffff"), (1.0, "#d9772b")]

POINTS = 2000  # of a curve that are drawn
BINS = 256  # of steps, in figures by expert: half as many at least where there are more records


def style(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Give a figure the look that all figures share.

    `height` is in pixels; `layout` are further options of plotly's layout.
    """
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 56, "r": 16, "t": 34, "b": 44},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={"bgcolor": "white", "font": {"color": INK}},
        bargap=0.3,
    )
    figure.update_layout(**layout)
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=GRID, ticks="")
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=GRID, ticks="")
    figure.update_annotations(font={"size": 13, "color": MUTED})
    return figure


def curves(columns: dict[str, np.ndarray], names: dict[str, str], width: int) -> go.Figure:
    """Draw one small plot for each key of `names` that was recorded, over steps; `width` of them beside each other."""
    present = {key: title for key, title in names.items() if not np.isnan(columns[key]).all()}
    width = min(width, len(present))
    rows = -(-len(present) // width)
    figure = make_subplots(
        rows, width, subplot_titles=list(present.values()), vertical_spacing=0.26 / rows, horizontal_spacing=0.07
    )
    for number, key in enumerate(present):
        drawn = np.flatnonzero(~np.isnan(columns[key]))
        drawn = drawn[:: -(-len(drawn) // POINTS)]
        x, y = columns["step"][drawn].tolist(), columns[key][drawn].tolist()
        line = go.Scatter(x=x, y=y, mode="lines", line={"color": MODEL, "width": 1.8}, name=present[key])
        figure.add_trace(line, number // width + 1, number % width + 1)
    return style(figure, 60 + 210 * rows, showlegend=False)


def over_even(chunks: Iterable[TableChunk]) -> go.Figure | None:
    """Draw a table by layer over its even share: each expert over the mean of its layer, over steps.

    The table is [N, ..., E] for N layers of E experts. Axes between layers and experts are summed, and so are
    neighboring records where there are many. Returns None without any.
    """
    steps, values_RNE = _binned(chunks)
    if not steps:
        return None
    layers, experts = values_RNE.shape[1:]
    titles = [f"expert layer {layer}" for layer in range(layers)]
    figure = make_subplots(1, layers, subplot_titles=titles, horizontal_spacing=min(0.06, 0.5 / layers))
    for layer in range(layers):
        values = values_RNE[:, layer]
        total = values.sum(1, keepdims=True)
        share = np.divide(values, total, out=np.zeros_like(values), where=total > 0) * experts
        heat = go.Heatmap(
            x=steps,
            y=[f"{expert}" for expert in range(experts)],
            z=share.T.round(3),
            zmin=0,
            zmax=2,
            colorscale=LOAD_SCALE,
            colorbar={"title": "x even", "thickness": 12, "outlinewidth": 0},
            showscale=layer == layers - 1,
            hovertemplate="step %{x}, expert %{y}: %{z:.2f} x even<extra></extra>",
        )
        figure.add_trace(heat, 1, layer + 1)
        figure.update_xaxes(title="step", row=1, col=layer + 1)
    figure.update_yaxes(title="expert", row=1, col=1)
    return style(figure, 320)


def _binned(chunks: Iterable[TableChunk]) -> tuple[list[int], np.ndarray]:
    """Sums of as many neighboring records as leave at most `BINS`: the last step of each bin, and [bins, N, E] f64."""
    steps: list[int] = []
    bins: list[np.ndarray] = []
    width = filled = 1  # records of a bin, and of the last one
    for chunk in chunks:
        records, layers, *_, experts = chunk.values.shape
        for step, value in zip(chunk.steps.tolist(), chunk.values.reshape(records, layers, -1, experts).sum(2)):
            if bins and filled < width:
                steps[-1], bins[-1], filled = step, bins[-1] + value, filled + 1
                continue
            if len(bins) == BINS:
                steps, width = steps[1::2], 2 * width
                bins = [one + other for one, other in zip(bins[::2], bins[1::2])]
            steps.append(step)
            bins.append(value.astype(float))
            filled = 1
    return steps, np.array(bins)


def would_drop(advice: CapacityAdvice) -> go.Figure:
    """Draw the share of the choices that each capacity factor would have dropped, by layer of experts and of all."""
    lines = [
        go.Scatter(x=advice.factors, y=rates, mode="lines+markers", line={"width": 1.2}, name=f"expert layer {layer}")
        for layer, rates in enumerate(advice.rates)
    ]
    whole = {"color": INK, "width": 2.4}
    lines.append(go.Scatter(x=advice.factors, y=advice.rates_overall, mode="lines", line=whole, name="all layers"))
    figure = go.Figure(lines)
    figure.add_hline(y=LIMIT, line={"color": ABLATED, "dash": "dot"}, annotation_text=f"{LIMIT:.1%}")
    figure.update_traces(hovertemplate="capacity factor %{x:.2f}: %{y:.3%}<extra>%{fullData.name}</extra>")
    return style(figure, 340, xaxis_title="capacity factor", yaxis={"title": "choices dropped", "tickformat": ".1%"})


def cross_entropy_bars(evaluation: dict[str, Any]) -> go.Figure | None:
    """Draw held-out CE beside the unigram entropy of the same tokens, by source and modality of the target."""
    rows = [
        (f"{source}<br>{kind}", entry["ce"], entry["unigram"])
        for source, kinds in evaluation["ce_by_source"].items()
        for kind, entry in kinds.items()
    ]
    if not rows:
        return None
    names, ce, unigram = zip(*rows)
    figure = go.Figure(
        [
            _bar(names, ce, "model", MODEL),
            _bar(names, unigram, "unigram entropy", BASELINES["hold_last"]),
        ]
    )
    return style(figure, 340, yaxis_title="nats per token", barmode="group")


def action_errors(evaluations: dict[str, dict[str, Any]]) -> go.Figure | None:
    """Draw the action error of the model, its baselines, and the model without sight, overall and by dimension."""
    plain = evaluations[""]
    if not plain["actions"]:
        return None
    dimensions = plain["actions"]["by_dimension"]
    names = ["all", *dimensions]

    def column(evaluation: dict[str, Any], who: str) -> list[float | None]:
        by_dimension = evaluation["actions"].get("by_dimension", {})
        whole = evaluation["actions"]["all"][who] if evaluation["actions"] else None
        return [whole, *(by_dimension[name][who] if name in by_dimension else None for name in dimensions)]

    bars = [_bar(names, column(plain, "model"), "model", MODEL)]
    for name, evaluation in evaluations.items():
        if evaluation["ablation"] and not evaluation["shards"]:
            color = ABLATED if evaluation["ablation"]["mode"] == "shuffle" else BLANKED
            bars.append(_bar(names, column(evaluation, "model"), f"model, {name.replace('-', ' ')}", color))
    bars += [_bar(names, column(plain, who), BASELINE_NAMES[who], BASELINES[who]) for who in BASELINES]
    return style(go.Figure(bars), 360, yaxis_title="mean squared error, normalized", barmode="group")


def trace(examples: dict[str, Any], ablated: dict[str, dict[str, Any]], dimension: int) -> go.Figure:
    """Draw predicted and logged action (the first step of every chunk) over the longest held-out recordings.

    `ablated`: the examples of the same source under each ablation, drawn faintly.
    """
    traces = examples["traces"]
    titles = [f"recording {item['recording']}" for item in traces]
    figure = make_subplots(1, len(traces), subplot_titles=titles, horizontal_spacing=0.06, shared_yaxes=True)
    for column, item in enumerate(traces, start=1):
        lines = [("logged", item, "true", INK, "solid"), ("predicted", item, "predicted", MODEL, "solid")]
        for name, other in ablated.items():
            same = [o for o in other["traces"] if o["recording"] == item["recording"]]
            lines += [(f"predicted, {name.replace('-', ' ')}", o, "predicted", ABLATED, "dot") for o in same]
        for name, of, key, color, dash in lines:
            line = go.Scatter(
                x=of["x"],
                y=[row[dimension] for row in of[key]],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers" if len(of["x"]) < 60 else "lines",
                line={"color": color, "width": 2, "dash": dash},
                marker={"size": 5},
            )
            figure.add_trace(line, 1, column)
        figure.update_xaxes(title=item["axis"], row=1, col=column)
    figure.update_yaxes(title=examples["names"][dimension], row=1, col=1)
    return style(figure, 340, margin={"l": 56, "r": 16, "t": 60, "b": 44}, legend_y=1.1)


def scatter(examples: dict[str, Any]) -> go.Figure:
    """Draw predicted over logged first steps, a plot for each action dimension."""
    names, points = examples["names"], examples["scatter"]
    true, predicted = np.array(points["true"]), np.array(points["predicted"])
    figure = make_subplots(1, len(names), subplot_titles=names, horizontal_spacing=0.08)
    for column in range(len(names)):
        x, y = true[:, column], predicted[:, column]
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        line = go.Scatter(x=ends, y=ends, mode="lines", line={"color": BASELINES["hold_last"], "dash": "dot"})
        dots = go.Scatter(x=x, y=y, mode="markers", marker={"color": MODEL, "size": 5, "opacity": 0.45})
        figure.add_trace(line, 1, column + 1)
        figure.add_trace(dots, 1, column + 1)
        figure.update_xaxes(title="logged", row=1, col=column + 1)
    figure.update_yaxes(title="predicted", row=1, col=1)
    return style(figure, 320, showlegend=False)


def retrieval(evaluations: dict[str, dict[str, Any]]) -> go.Figure | None:
    """Draw recall by kind of pair, with its lower 95 % bound and chance, with and without sight."""
    rows = []
    for name, evaluation in evaluations.items():
        if evaluation["shards"]:
            continue
        for kind, entry in evaluation["retrieval"]["by"].items():
            pool = entry if entry["r1"] is not None else entry["smaller_pool"]
            if pool is not None:
                label = f"{kind}, pool of {pool['pool']}" + (f"<br>{name.replace('-', ' ')}" if name else "")
                rows.append((label, pool["r1"], pool["r1_low"], pool["r5"], pool["chance"]))
    if not rows:
        return None
    names, r1, low, r5, chance = zip(*rows)
    first = _bar(names, r1, "recall@1 (whisker: lower 95 % bound)", MODEL)
    down = [share - bound for share, bound in zip(r1, low)]
    first.error_y = {"type": "data", "array": [0] * len(r1), "arrayminus": down, "color": INK, "thickness": 1.2}
    marks = go.Scatter(
        x=names,
        y=chance,
        mode="markers",
        name="chance, recall@1",
        marker={"symbol": "line-ew-open", "size": 34, "color": ABLATED, "line": {"width": 2}},
    )
    figure = go.Figure([first, _bar(names, r5, "recall@5", "#9dbdea"), marks])
    return style(figure, 360, yaxis_title="share of queries", yaxis_rangemode="tozero", barmode="group")


def _bar(x: Any, y: Any, name: str, color: str) -> go.Bar:
    return go.Bar(
        x=list(x),
        y=list(y),
        name=name,
        marker={"color": color, "line": {"width": 0}},
        hovertemplate=f"%{{x}}<br>{name}: %{{y:.4g}}<extra></extra>",
    )
