"""Search for a shape as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.formatting import count, fixed, number, percent, share, times
from llmprune.results.sentences.search import describe_broken, describe_budgets, describe_search

_MOST_LETTERS = 24  # of all sources that have a column of their own in 80 columns


def print_search(found: SearchFigures, console: Console) -> None:
    """Print the shape chosen for each budget, what one step further costs, the frontier, and notes."""
    console.print(Text(describe_search(found)))
    for budget in describe_budgets(found):
        console.print()
        console.print(Text.assemble(("Budget  ", "bold"), budget.limits))
        console.print(Text.assemble(("Chosen  ", "bold green"), budget.choice))
        for sentence in budget.margin:
            console.print(Text(f"- {sentence}"))
        for sentence in budget.further:
            console.print(Text(f"- one step further in {sentence}"))
    console.print()
    console.print(Text("On the frontier, by size:", "bold"))
    console.print(_frontier(found))
    for sentence in (*describe_broken(found), *found.notes):
        console.print(Text.assemble(("Note: ", "yellow"), sentence))


def search_lines(found: SearchFigures) -> list[str]:
    """Return the lines of a run's summary: the search, and for each reported budget the choice and its margin."""
    choices = ["; ".join([budget.choice, *budget.margin]) for budget in describe_budgets(found)]
    return [describe_search(found), *choices, *describe_broken(found), *found.notes]


def _frontier(found: SearchFigures) -> Table:
    """Return the shapes on the frontier by size, with their divergence by source; of many sources the worst."""
    shapes = found.frontier
    several = len(found.sources) > 1
    names = {source: source.rsplit("/", 1)[-1] for source in found.sources}  # one without a name has its path
    worst = several and sum(map(len, names.values())) > _MOST_LETTERS
    timed = any(one.speed is not None for one in shapes)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    counted = _counted(shapes)
    heads = [*counted, "params", "of dense", *(["speed"] if timed else []), "score"]
    heads += ["worst source"] if worst else list(names.values()) if several else []
    for head in heads:
        table.add_column(head, justify="right", overflow="fold", no_wrap=head in ("params", "score"))
    table.add_column("", overflow="fold")
    chosen = {(one.name, size) for size, one in enumerate(found.chosen)}
    for place, one in enumerate(shapes):
        cells = [column[place] for column in counted.values()]
        cells += [count(one.parameters), percent(share(found.dense_parameters, one.parameters))]
        cells += [times(one.speed)] if timed else []
        cells += [fixed(one.score)]
        if worst:
            source = max(one.divergence, key=one.divergence.__getitem__)
            cells.append(f"{names[source]} {fixed(one.divergence[source])}")
        elif several:
            cells += [fixed(one.divergence[source]) for source in found.sources]
        is_chosen = (one.name, one.size) in chosen
        remark = "chosen" if is_chosen else "further" if one.further else ""
        table.add_row(*map(Text, cells), Text(remark), style="bold" if is_chosen else None)
    return table


def _counted(shapes: tuple[TriedShape, ...]) -> dict[str, list[str]]:
    """Return the columns with the numbers of units, without those that the model does not have."""
    fields = list(dict.fromkeys(field for one in shapes for field in one.widths))
    columns: dict[str, list[int | None]] = {"layers": [one.layers for one in shapes]}
    columns |= {"neurons" if len(fields) == 1 else field: [one.widths.get(field) for one in shapes] for field in fields}
    columns |= {"groups": [one.kv_groups for one in shapes], "experts": [one.experts for one in shapes]}
    return {name: list(map(number, column)) for name, column in columns.items() if any(column)}
