"""GPUs of a run: how many processes share them, and whether those that a recipe names are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmprune.common.devices import choose_gpus, visible_gpus
from llmprune.common.errors import RecipeError
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe


def count_processes(recipe: Recipe, *, halves: bool) -> tuple[int, str]:
    """Return the number of processes for a run on this machine, and a note where it is not that of the chosen GPUs.

    ``halves``: every process needs a window of each half of the calibration windows. Raises RecipeError for absent
    GPUs.
    """
    gpus = len(choose_gpus(recipe.devices))
    if gpus < 2 or _places_layers(recipe.model):
        return 1, ""
    windows = recipe.calibration.shape()[0] // (2 if halves else 1)
    if windows >= gpus:
        return gpus, ""
    processes = max(1, windows)
    half = " in each half" if halves else ""
    return processes, (
        f"{processes} of the {gpus} GPUs work at a time, because calibration has only {windows} windows{half}; raise "
        "calibration.samples to use all"
    )


def require_devices(recipe: Recipe) -> None:
    """Raise RecipeError that lists every device that a recipe names and this machine lacks."""
    chosen, model = len(choose_gpus(recipe.devices)), recipe.model
    placed = model.device_map.values() if isinstance(model.device_map, dict) else ()
    problems = [
        *_absent("model.device_map", placed, chosen=chosen),
        *_absent("model.max_memory", model.max_memory or (), chosen=chosen),
    ]
    if problems:
        raise RecipeError(problems)


def _places_layers(model: ModelSource) -> bool:
    """Check whether a recipe spreads the layers over the GPUs, which one process does."""
    limits_gpus = any(device not in ("cpu", "disk") for device in model.max_memory or ())
    return isinstance(model.device_map, dict) or model.device_map == "balanced" or limits_gpus


def _absent(key: str, named: Any, *, chosen: int) -> Iterator[str]:
    """Yield a sentence for each device of ``named`` that is absent. ``chosen``: number of GPUs of the run."""
    for device in dict.fromkeys(named):
        if device == "disk":
            continue
        try:
            found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        except RuntimeError:
            yield f"{key}: {device!r} is no device; write the number of a GPU, cpu or disk"
            continue
        if found.type == "cuda" and (found.index or 0) >= chosen:
            those = f"this run uses {chosen} of them, counted from 0" if chosen else "this run computes on the CPU"
            yield (
                f"{key}: names {device if isinstance(device, str) else f'GPU {device}'}; torch sees {visible_gpus()}, "
                f"and {those}; name one of these, cpu or disk"
            )
        elif found.type not in ("cuda", "cpu") and found.type != _accelerator():
            yield f"{key}: names {device}, and torch has no such device here; name a GPU by its number, cpu or disk"


def _accelerator() -> str | None:
    """Return the type of this machine's accelerator; None where it has none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type
