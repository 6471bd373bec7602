"""Family of models: one page and one table that compare its members."""

from __future__ import annotations

import io

from helpers.reports import DENSE, bare_report, sample_report
from helpers.searching import searched
from rich.console import Console

from llmprune.report.family_table import print_family
from llmprune.report.html.family_page import render_family
from llmprune.report.runs import Run


def family() -> list[Run]:
    """Return three members, the last of which was not evaluated."""
    found = searched(0.9, 0.8, 0.7)
    members = []
    for place in range(3):
        shape = found.chosen_shape(place)
        sizes = {"parameters": shape.parameters, "layers": shape.layers, "widths": shape.widths}
        pruned = DENSE.model_copy(update=sizes | {"bytes": shape.bytes, "kv_groups": shape.kv_groups})
        values = {"pruned": pruned, "dense": DENSE.model_copy(update={"kv_groups": 3})}
        report = sample_report() if place < 2 else bare_report()
        search = found.model_copy(update={"member": place})
        members.append(Run(f"members/{place + 1}", report.model_copy(update=values | {"search": search})))
    return members


def test_the_page_compares_the_members_and_shows_the_search_once() -> None:
    """Sizes, shape, divergence, perplexity, retention and speed stand in a row; a missing figure is a dash."""
    page = render_family(family())
    assert "3 models from one scoring pass." in page
    assert "<td>118.1 M</td><td>87.8%</td><td>236 MB</td><td>29</td><td>1,280</td><td>3</td>" in page
    assert "<td>0.115</td><td>21.94</td><td>94.8%</td><td>92.1–97.4%</td><td>1.24×</td><td>pass</td>" in page
    assert "<td>0.386</td><td>–</td><td>–</td>" in page
    assert page.count("<strong>Chosen:</strong>") == 3
    assert page.count('id="frontier-title"') == 1
    assert "2 · members/2" in page
    assert "<script" not in page


def test_the_terminal_has_a_column_for_each_member() -> None:
    """The figures stand below the names, within 80 columns, without rows that nothing has."""
    console = Console(file=io.StringIO(), width=80)
    print_family(family(), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {"layers 30 29 29 29", "MLP width 1,536 1,280 1,216 960", "score 0.115 0.238 0.386"} <= rows
    assert "experts" not in text
    assert max(map(len, text.splitlines())) <= 80
