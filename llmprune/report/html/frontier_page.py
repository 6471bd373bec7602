"""Search for a shape as one self-contained HTML page: no network, no script."""

from __future__ import annotations

from llmprune.report.html.page import environment
from llmprune.report.html.search_section import view_search
from llmprune.results.figures.search import SearchFigures


def render_frontier(found: SearchFigures, model: str) -> str:
    """Return the page as text. ``model``: name of the dense model."""
    return environment().get_template("frontier.html.j2").render(view=view_search(found), model=model, tiles=[])
