"""How many calibration windows the dense model writes itself, where the recipe leaves it to the plan."""

from __future__ import annotations

from llmprune.checkpoint.location import headers_of
from llmprune.checkpoint.model_memory import memory_for_models, whole_model_bytes
from llmprune.common.distributed import broadcast_from_first
from llmprune.common.errors import LLMPruneError
from llmprune.recipe.recipe import Recipe


def settle_self_generated(recipe: Recipe, *, starts: int = 1, chosen: int | None = None) -> Recipe:
    """Return the recipe with a number in place of ``self_generated: auto``: 0 where the devices cannot hold the model.

    Every generated token would then read the layers anew. ``starts``: number of processes that the run will start in
    place of this one; the one that writes then has its share of the memory. ``chosen``: the number that was chosen
    before, which stays. A model of unknown size is taken to fit. A recipe whose model cannot be read stays as it is:
    the plan reports that.
    """
    calibration = recipe.calibration
    if calibration.self_generated != "auto":
        return recipe
    if chosen is not None:
        return _with(recipe, chosen)
    try:
        known = headers_of(recipe.model)  # a plan reads no weights to find their size
        fits = not known or whole_model_bytes(recipe.model) <= memory_for_models(recipe.model) // starts
        fits = broadcast_from_first(fits)
    except LLMPruneError:
        return recipe
    return _with(recipe, calibration.generated if fits else 0)


def _with(recipe: Recipe, generated: int) -> Recipe:
    calibration = recipe.calibration.model_copy(update={"self_generated": generated})
    return recipe.model_copy(update={"calibration": calibration})


def about_self_generated(recipe: Recipe, settled: Recipe) -> list[str]:
    """Return a note where the model would write windows itself but is too large for that."""
    wanted = recipe.calibration.generated
    if not wanted or settled.calibration.generated:
        return []
    return [
        "the dense model writes no calibration windows itself, because its devices cannot hold all of it; "
        f"calibration.self_generated: {wanted} has it write them nevertheless, slowly"
    ]
