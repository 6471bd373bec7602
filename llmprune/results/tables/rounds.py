"""Sizes after each round of cut and training, as the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.results.figures.model_size import Size
from llmprune.results.formatting import count, fixed, number
from llmprune.results.report_schema import Report
from llmprune.results.tables.sizes import width_names
from llmprune.results.tables.text_table import TextTable


def round_table(report: Report) -> TextTable:
    """Return sizes, held-out divergence before and after the training, and tokens of the dense model and each round."""
    rounds = report.rounds
    sizes = size_columns([report.dense, *(one.size for one in rounds)])
    trained = [("", "", ""), *((fixed(one.before), fixed(one.after), count(one.tokens)) for one in rounds)]
    rows = [(*cells, *of_round) for cells, of_round in zip(sizes.rows, trained, strict=True)]
    return TextTable((*sizes.heads, "KL before", "saved", "tokens"), tuple(rows))


def size_columns(sizes: Sequence[Size]) -> TextTable:
    """Return the numbers that change from round to round. ``sizes``: of the dense model, and after each round."""
    dense = sizes[0]
    columns = [("parameters", [count(one.parameters) for one in sizes])]
    counted: list[tuple[str, list[int | None]]] = [("layers", [one.layers for one in sizes])]
    counted += [(name, [one.widths.get(field) for one in sizes]) for field, name in width_names(dense.widths).items()]
    counted += [("experts", [one.experts for one in sizes]), ("key-value heads", [one.kv_groups for one in sizes])]
    columns += [(name, [number(value) for value in values]) for name, values in counted if len(set(values)) > 1]
    names = ["dense", *(str(round_) for round_ in range(1, len(sizes)))]
    rows = zip(names, *(cells for _, cells in columns), strict=True)
    return TextTable(("round", *(name for name, _ in columns)), tuple(rows))
