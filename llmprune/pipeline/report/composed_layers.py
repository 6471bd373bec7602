"""Layer tables of several rounds as one table of the first dense model's layers."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.results.figures.layers import LayerFigures
from llmprune.results.figures.stability import SourceFigures


def compose_layers(rounds: Sequence[Sequence[LayerFigures]]) -> tuple[LayerFigures, ...]:
    """Return one row for each layer of the first dense model, from the tables of all rounds in their order.

    The table of a round counts the layers that the rounds before left. A layer has the figures of the last round that
    saw it; its width, and the indices of kept experts and key-value groups, are those of the first dense model.
    """
    composed = list(rounds[0])
    for rows in rounds[1:]:
        for layer, row in zip(layers_left(composed), rows, strict=True):
            composed[layer] = _composed(composed[layer], row)
    return tuple(composed)


def layers_left(rows: Sequence[LayerFigures]) -> list[int]:
    """Return the indices of the layers that are not removed."""
    return [row.layer for row in rows if not row.removed]


def compose_sources(found: SourceFigures, left: Sequence[int], *, layers: int) -> SourceFigures:
    """Return the comparison of the sources by layer of the first dense model. ``left``: its layers that were compared.

    ``layers``: number of the first dense model's layers.
    """

    def spread(values: Sequence[float | None]) -> tuple[float | None, ...]:
        by_layer = dict(zip(left, values, strict=True)) if values else {}
        return tuple(by_layer.get(layer) for layer in range(layers)) if values else ()

    return found.model_copy(
        update={
            "removed_layers": tuple(tuple(left[layer] for layer in removed) for removed in found.removed_layers),
            "neurons": spread(found.neurons),
            "heads": spread(found.heads),
            "experts": spread(found.experts),
        }
    )


def _composed(before: LayerFigures, row: LayerFigures) -> LayerFigures:
    kept = {}
    if not row.removed:
        for name in ("experts_kept", "kv_groups_kept"):
            kept[name] = _indices(getattr(before, name), getattr(row, name))
    scored = {
        name: getattr(row, name) if getattr(row, name) is not None else getattr(before, name)
        for name in ("importance", "score_share", "kv_groups_share")
        if not row.removed or name == "importance"
    }
    return row.model_copy(update=scored | kept | {"layer": before.layer, "width": before.width})


def _indices(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return what is kept of the first dense model, where a later round counts what an earlier one left."""
    if before is None or after is None:
        return after if before is None else before
    return tuple(before[index] for index in after)
