"""Puts pages together: `templates/page.html` is the frame of all of them, `templates/parts.html` what stands in it."""

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

_TEMPLATES = Environment(
    loader=PackageLoader("mmoe.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

parts: Any = _TEMPLATES.get_template("parts.html").module
"""The macros of `parts.html`; each gives Markup, and escapes the text it is given."""

Section = tuple[str, Markup]  # heading and content


def page(title: str, lead: str, cards: Iterable[Markup], sections: Iterable[Section]) -> str:
    """Render a self-contained page of HTML."""
    plotly, joined = Markup(get_plotlyjs()), Markup().join(cards)
    return _TEMPLATES.get_template("page.html").render(
        title=title, lead=lead, cards=joined, sections=sections, plotly=plotly
    )


def plot(figure: go.Figure, **config: Any) -> Markup:
    """Render a figure as a part of a page; `config` is plotly's."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, **config}))
