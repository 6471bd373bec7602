"""Family of models from one scoring pass as one HTML page: what each size kept, and the search behind them."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.report.family_rows import family_table
from llmprune.report.html.compare_page import retention_dots
from llmprune.report.html.interval_charts import size_chart
from llmprune.report.html.page import environment
from llmprune.report.html.search_section import view_search
from llmprune.report.runs import Run, mean_interval, warnings_of


def render_family(members: Sequence[Run]) -> str:
    """Return the page as text. ``members``: the largest first; their names are those of the rows."""
    search = members[0].report.search
    plotted = [member for member in members if member.report.mean_retention is not None]
    numbers = {member.name: place for place, member in enumerate(plotted, start=1)}
    return (
        environment()
        .get_template("family.html.j2")
        .render(
            model=members[0].report.provenance.model,
            table=family_table(members),
            numbers=numbers,
            chart=size_chart(retention_dots(members)),
            interval=mean_interval(members),
            search=None if search is None else view_search(search.model_copy(update={"member": None})),
            warnings=warnings_of(members),
            tiles=[],
        )
    )
