"""Sections of a recipe that cut a model to a shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.recipe.budget import HeadsAxis
from llmprune.recipe.width_rounding import width_step
from llmprune.results.figures.search import SearchFigures, TriedShape


@dataclass(frozen=True)
class KeptUnits:
    """Units that a shape keeps. ``removed``: indices of layers, or their number where they are not chosen.

    ``widths``, ``dense_widths``: neurons by config field. ``kv_groups``, ``experts``: None if all are kept.
    """

    removed: tuple[int, ...] | int
    widths: Mapping[str, int]
    dense_widths: Mapping[str, int]
    kv_groups: int | None
    experts: int | None

    @classmethod
    def of_tried(cls, found: SearchFigures, shape: TriedShape) -> KeptUnits:
        """Return the units of a shape that a search tried."""
        return cls(
            removed=shape.removed,
            widths=shape.widths,
            dense_widths=found.dense_widths,
            kv_groups=shape.kv_groups if shape.kv_groups != found.dense_kv_groups else None,
            experts=shape.experts if shape.experts != found.dense_experts else None,
        )

    @property
    def neurons(self) -> dict[str, int]:
        """Neurons kept, by the fields that lose some."""
        return {field: kept for field, kept in self.widths.items() if kept < self.dense_widths[field]}


def sections_of_shape(kept: KeptUnits, *, axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values of ``depth``, ``width`` and ``experts``, those that the shape needs.

    ``axes``: settings of a budget's axes by name, whose criteria and multiple are kept.
    """
    given = {axis: settings for axis, settings in axes.items() if isinstance(settings, Mapping)}
    sections = {
        "depth": _depth(kept.removed) if kept.removed else {},
        "width": _width(kept, given),
        "experts": {} if kept.experts is None else {"keep": kept.experts} | _criterion(given, "experts"),
    }
    return {section: values for section, values in sections.items() if values}


def _depth(removed: tuple[int, ...] | int) -> dict[str, Any]:
    return {"remove": removed} if isinstance(removed, int) else {"layers": list(removed)}


def _width(kept: KeptUnits, axes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    neurons = kept.neurons
    if neurons:
        values["neurons"] = next(iter(neurons.values())) if len(kept.dense_widths) == 1 else neurons
        multiple = axes.get("mlp", {}).get("multiple", "auto")
        if multiple != "auto":
            values["multiple"] = multiple
        elif any(width % width_step(kept.dense_widths[field]) for field, width in neurons.items()):
            values["multiple"] = min(map(width_step, neurons.values()))  # or they would be rounded
        values |= _criterion(axes, "mlp")
    if kept.kv_groups is not None:
        values["heads"] = kept.kv_groups
        own = _criterion(axes, "heads", key="heads_criterion")
        if not own and "criterion" in values:  # which heads would take too
            own = {"heads_criterion": {"kind": HeadsAxis().criterion.kind}}
        values |= own
    return values


def _criterion(axes: Mapping[str, Mapping[str, Any]], axis: str, *, key: str = "criterion") -> dict[str, Any]:
    """Return the criterion that a budget names for an axis, under the key of the section."""
    criterion = axes.get(axis, {}).get("criterion")
    return {} if criterion is None else {key: criterion}
