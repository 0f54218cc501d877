"""Draws the page of `mmoe clock-report`: the table of `preparation.clock_report`, and histograms of what it sums up."""

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from mmoe.preparation.clock_report import COLUMNS, SYNTHETIC, ClockReport, StreamTiming, report_rows, text
from mmoe.reporting.figures import MODEL, style
from mmoe.reporting.page import page, parts, plot

_BINS = 80


def render_clock_page(report: ClockReport) -> str:
    """Render the report on a source's clocks as self-contained HTML."""
    refusals = [parts.note(f"refused: {reason}: {count:,}") for reason, count in sorted(report.unreadable.items())]
    streams = [parts.table(COLUMNS, report_rows(report)), parts.note(_NOTE), *refusals]
    others = [stream for stream in report.streams if stream.name != report.reference and len(stream.offsets)]
    sections = [("Made times", parts.paragraph(SYNTHETIC))] if report.kind == "synthetic" else []
    sections.append(("Streams", Markup().join(streams)))
    sections.append(("Intervals between readings, ms", plot(_histograms(report.streams, "intervals"))))
    if others:
        sections.append((f"Nearest reading minus {report.reference}, ms", plot(_histograms(others, "offsets"))))
    lead = f"{report.kind} clocks; {report.logs:,} logs with {report.references:,} references"
    return page(f"Clocks of {report.title}", lead, map(_card, report.streams), sections)


_NOTE = (
    'A gap is an interval of more than twice the median. "Within 1 ms" is the share of references '
    "that have a raw reading so near. Offset is the nearest reading minus the reference, where the stream reaches; "
    "drift is its slope, where the stream's rate is a multiple of the reference's. Start and end are the stream's "
    "first and last reading after those of the reference."
)


def _card(stream: StreamTiming) -> Markup:
    return parts.named_card(stream.name, f"{text(stream.rate_hz, 3)} Hz", f"{stream.readings:,} readings")


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
