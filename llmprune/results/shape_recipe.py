"""Sections of a recipe that cut a model to a shape that a search has tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.results.search_figures import SearchFigures, TriedShape


def sections_of_shape(found: SearchFigures, shape: TriedShape, *, axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``depth``, ``width`` and ``experts`` as data, those that the shape needs.

    ``axes``: of the recipe's budget, whose criteria are kept.
    """
    experts = {"keep": shape.experts} | _criterion(axes, "experts", key="criterion")
    sections = {
        "depth": {"layers": list(shape.removed)} if shape.removed else {},
        "width": _width(found, shape, axes=axes),
        "experts": experts if shape.experts != found.dense_experts else {},
    }
    return {section: values for section, values in sections.items() if values}


def _width(found: SearchFigures, shape: TriedShape, *, axes: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    neurons = {field: kept for field, kept in shape.widths.items() if kept < found.dense_widths[field]}
    if neurons:
        only = len(found.dense_widths) == 1
        values["neurons"] = next(iter(neurons.values())) if only else neurons
        if any(kept % min(_power_of_two(found.dense_widths[field]), 256) for field, kept in neurons.items()):
            values["multiple"] = min(map(_power_of_two, neurons.values()))  # or they could be rounded
        values |= _criterion(axes, "mlp", key="criterion")
    if shape.kv_groups != found.dense_kv_groups:
        values["heads"] = shape.kv_groups
        values |= _criterion(axes, "heads", key="heads_criterion")
    return values


def _power_of_two(width: int) -> int:
    """Return the largest power of two that divides a width."""
    return width & -width


def _criterion(axes: Mapping[str, Any], axis: str, *, key: str) -> dict[str, Any]:
    """Return the criterion that a budget names for an axis, under the key of the section."""
    settings = axes.get(axis)
    criterion = settings.get("criterion") if isinstance(settings, dict) else None
    return {} if criterion is None else {key: criterion}
