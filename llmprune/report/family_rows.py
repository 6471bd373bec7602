"""Members of a family of models as rows of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.report.runs import Run, has_trained, mean_interval
from llmprune.results.formatting import NOTHING, byte_size, count, fixed, number, percent, share, span, speedup, times
from llmprune.results.report_schema import Report
from llmprune.results.tables.sizes import width_names
from llmprune.results.tables.text_table import TextTable


def family_table(members: Sequence[Run]) -> TextTable:
    """Return the figures of the dense model and of each member, without columns that have none."""
    dense = members[0].report.dense
    reports = [member.report for member in members]
    columns: list[tuple[str, list[str]]] = [
        ("parameters", [count(dense.parameters), *(count(one.pruned.parameters) for one in reports)]),
        ("of dense", [percent(1), *(percent(share(dense.parameters, one.pruned.parameters)) for one in reports)]),
        ("weights", [byte_size(dense.bytes), *(byte_size(one.pruned.bytes) for one in reports)]),
        ("layers", [number(dense.layers), *(number(one.pruned.layers) for one in reports)]),
        *(
            (name, [number(width), *(number(one.pruned.widths.get(field)) for one in reports)])
            for (field, name), width in zip(width_names(dense.widths).items(), dense.widths.values(), strict=True)
        ),
        ("key-value heads", [number(dense.kv_groups), *(number(one.pruned.kv_groups) for one in reports)]),
        ("experts", [number(dense.experts), *(number(one.pruned.experts) for one in reports)]),
        ("score", ["", *map(_score, reports)]),
        ("perplexity", [_dense_perplexity(reports), *map(_perplexity, reports)]),
        ("trained on", ["", *(count(one.trained_tokens) for one in reports)] if has_trained(members) else []),
        ("retained", ["", *(percent(one.mean_retention) for one in reports)]),
        (mean_interval(members), ["", *(span(one.retention.interval if one.retention else None) for one in reports)]),
        ("speed", ["", *(times(speedup(one.speed)) if one.speed else NOTHING for one in reports)]),
        ("gate", ["", *(one.gate.verdict if one.gate else NOTHING for one in reports)]),
    ]
    known = [(head, cells) for head, cells in columns if set(cells) - {"", NOTHING}]
    names = ["dense", *(member.name for member in members)]
    rows = zip(names, *(cells for _, cells in known), strict=True)
    return TextTable(("model", *(head for head, _ in known)), tuple(rows))


def _score(report: Report) -> str:
    """Return the score of the member's shape in the search."""
    found = report.search
    return NOTHING if found is None else fixed(found.chosen_shape(found.sizes[0]).score)


def _perplexity(report: Report) -> str:
    return NOTHING if report.perplexity is None else number(report.perplexity.pruned)


def _dense_perplexity(reports: Sequence[Report]) -> str:
    return next((number(one.perplexity.dense) for one in reports if one.perplexity), "")
