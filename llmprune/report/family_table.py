"""Family of models from one scoring pass, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.report.family_rows import family_table
from llmprune.report.runs import Run, warnings_of


def print_family(members: Sequence[Run], console: Console) -> None:
    """Print a column for the dense model and for each member, a row for each figure, and differences of settings."""
    found = family_table(members)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for name, *_ in found.rows:
        table.add_column(Text(name), justify="right", overflow="fold")
    for place, head in enumerate(found.heads[1:], start=1):
        table.add_row(Text(head), *(Text(row[place]) for row in found.rows))
    console.print(table)
    for warning in warnings_of(members):
        console.print(Text.assemble(("Warning: ", "bold yellow"), warning))
