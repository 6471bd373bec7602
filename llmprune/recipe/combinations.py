"""Sections of a recipe that cannot be combined. Each check raises ValueError with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmprune.recipe.budget import Budget
from llmprune.recipe.hub import Hub
from llmprune.recipe.recover import Recover

Sections = Mapping[str, Any]  # those before the checked one, in the order of the recipe's fields


def _check_budget(_: Budget, others: Sections) -> None:
    """Refuse sizes that a user names beside a budget, and images; the run itself adds sizes that it has searched."""
    if others.get("hidden") is not None:
        raise ValueError(
            "judges shapes with all channels of the residual stream, and with fewer of them the shapes rank otherwise, "
            "so hidden cannot be set beside it; remove hidden, or name depth and width of a shape beside it"
        )
    given = [name for name in ("depth", "width", "experts") if others.get(name) is not None]
    if given:
        keys = ", ".join(
            f"{name}.{key}"
            for name in given
            for key in type(others[name]).model_fields
            if key in others[name].model_fields_set
        )
        raise ValueError(
            f"chooses the shape, so {keys} cannot be set beside it; remove {' and '.join(given)}, or remove budget "
            f"and keep {keys} (how an axis is scored stands in budget.axes)"
        )
    calibration = others.get("calibration")
    if calibration is not None and calibration.has_images:
        raise ValueError(
            "judges shapes on beginnings of windows, which would cut images in two; search with text (remove "
            "calibration's images_field), then give depth and width of the shape that was found, with images"
        )


def _check_recover(recover: Recover, others: Sections) -> None:
    """Refuse a training without text: images calibrate only."""
    calibration = others.get("calibration")
    if calibration is None or not calibration.has_images or not recover.data.is_calibrations:
        return
    if all(source.images_field for source in calibration.text_sources()):
        raise ValueError(
            "trains on text, and each source of calibration has images; give recover.data, or add a source of text"
        )


def _check_hub(hub: Hub, others: Sections) -> None:
    """Refuse one repository for several models, and one for a quantized result that is not written."""
    export = others.get("export")
    if hub.quantized_repo_id is not None and export is not None and not export.requantize:
        raise ValueError(
            "quantized_repo_id is for the result in its base's format, which the recipe does not ask for; set "
            "export.requantize: true, or remove quantized_repo_id"
        )
    budget = others.get("budget")
    if budget is not None and budget.family is not None:
        raise ValueError(
            f"names one repository, and budget.{budget.family} is a list that makes several models; remove hub and "
            "push each with llmprune push RUN/members/1 --repo-id NAME"
        )


CHECKS: dict[str, Callable[[Any, Sections], None]] = {
    "budget": _check_budget,
    "recover": _check_recover,
    "hub": _check_hub,
}
