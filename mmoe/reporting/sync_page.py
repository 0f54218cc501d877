"""The HTML page of `mmoe sync-report`: the table of `preparation.sync_report`, and histograms of what it sums up."""

from html import escape
from string import Template

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from mmoe.preparation.sync_report import COLUMNS, SYNTHETIC, StreamTiming, SyncReport, rows, text
from mmoe.reporting.figures import MODEL, style
from mmoe.reporting.page import PAGE, STYLE

_BINS = 80


def render(report: SyncReport) -> str:
    """The page as self-contained HTML."""
    notice = f"<section><h2>Made times</h2><p>{SYNTHETIC}</p></section>" if report.kind == "synthetic" else ""
    refusals = sorted(report.unreadable.items())
    refused = "".join(f'<p class="note">refused: {escape(reason)}: {count:,}</p>' for reason, count in refusals)
    others = [stream for stream in report.streams if stream.name != report.reference and len(stream.offsets)]
    sections = [
        notice,
        f"<section><h2>Streams</h2>{_table(report)}{_NOTE}{refused}</section>",
        _section("Intervals between readings, ms", _histograms(report.streams, "intervals")),
        _section(f"Nearest reading minus {report.reference}, ms", _histograms(others, "offsets")) if others else "",
    ]
    return Template(PAGE).substitute(
        title=escape(f"Clocks of {report.title}"),
        style=STYLE,
        plotly=get_plotlyjs(),
        lead=escape(f"{report.kind} clocks; {report.logs:,} logs with {report.references:,} references"),
        cards="".join(map(_card, report.streams)),
        body="".join(sections),
    )


_NOTE = (
    '<p class="note">A gap is an interval of more than twice the median. "Within 1 ms" is the share of references '
    "that have a raw reading so near. Offset is the nearest reading minus the reference, where the stream reaches; "
    "drift is its slope, where the stream's rate is a multiple of the reference's. Start and end are the stream's "
    "first and last reading after those of the reference.</p>"
)


def _card(stream: StreamTiming) -> str:
    return (
        f'<div class="card"><span>{escape(stream.name)}</span><b>{text(stream.rate_hz, 3)} Hz</b>'
        f"<i>{stream.readings:,} readings</i></div>"
    )


def _table(report: SyncReport) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in line) + "</tr>" for line in rows(report))
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _section(title: str, figure: go.Figure) -> str:
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return f"<section><h2>{escape(title)}</h2>{plot}</section>"


def _histograms(streams: list[StreamTiming], field: str) -> go.Figure:
    columns = min(3, len(streams))
    lines = -(-len(streams) // columns)
    titles = [stream.name for stream in streams]
    figure = make_subplots(lines, columns, subplot_titles=titles, vertical_spacing=0.3 / lines, horizontal_spacing=0.07)
    for number, stream in enumerate(streams):
        # Counted here: the readings themselves would make a page of any size.
        counts, edges = np.histogram(getattr(stream, field), bins=_BINS)
        middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        bars = go.Bar(x=middle.round(4), y=counts, width=width, marker={"color": MODEL}, name=stream.name)
        figure.add_trace(bars, number // columns + 1, number % columns + 1)
    return style(figure, 60 + 210 * lines, showlegend=False)
