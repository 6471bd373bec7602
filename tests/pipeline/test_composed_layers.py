"""Layer tables of several rounds as one table of the first dense model."""

from __future__ import annotations

from typing import Any

from llmprune.pipeline.report.composed_layers import compose_layers, compose_sources, layers_left
from llmprune.results.figures.layers import LayerFigures
from llmprune.results.figures.stability import SourceFigures


def _row(layer: int, *, removed: bool = False, width: int = 8, **values: Any) -> LayerFigures:
    fields: dict[str, Any] = {"importance": None, "score_share": None, "error_cut": None, "error_refit": None}
    kept = None if removed else width
    return LayerFigures(**fields | {"layer": layer, "removed": removed, "width": width, "kept": kept} | values)


def test_later_rounds_count_what_earlier_ones_left() -> None:
    """Layer 1 goes in the first round, layer 3 in the second; indices of experts are those of the dense model."""
    first = [_row(0, experts_kept=(0, 2, 3), kept=6), _row(1, removed=True), _row(2), _row(3, importance=0.5)]
    second = [_row(0, width=6, experts_kept=(0, 2), kept=4), _row(1, width=8), _row(2, removed=True, importance=0.1)]
    rows = compose_layers([first, second])
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    assert layers_left(rows) == [0, 2]
    assert (rows[0].width, rows[0].kept, rows[0].experts_kept) == (8, 4, (0, 3))
    assert (rows[3].importance, rows[3].kept) == (0.1, None)


def test_sources_are_compared_by_layers_of_the_first_dense_model() -> None:
    """Figures of a layer that was gone before are None; layers that a source would remove have their first index."""
    found = SourceFigures(names=("a",), windows=(4,), removed_layers=((1,),), neurons=(0.5, 0.25), heads=(), experts=())
    spread = compose_sources(found, [0, 2], layers=3)
    assert (spread.removed_layers, spread.neurons, spread.heads) == (((2,),), (0.5, None, 0.25), ())
