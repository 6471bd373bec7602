"""How many windows the dense model writes itself for calibration and recovery, where the recipe leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.checkpoint.location import headers_of
from llmprune.checkpoint.model_memory import memory_for_models, whole_model_bytes
from llmprune.common.distributed import broadcast_from_first
from llmprune.common.errors import LLMPruneError
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import SelfGenerated


@dataclass(frozen=True)
class ChosenNumbers:
    """Numbers of windows that an earlier part of the run chose; None: not chosen yet."""

    calibration: int | None = None
    recovery: int | None = None


NOTHING_CHOSEN = ChosenNumbers()


def settle_self_generated(recipe: Recipe, *, starts: int = 1, chosen: ChosenNumbers = NOTHING_CHOSEN) -> Recipe:
    """Return the recipe with numbers in place of ``self_generated: auto``: 0 where the devices cannot hold the model.

    Every generated token would then read the layers anew. ``starts``: number of processes that the run will start in
    place of this one; the one that writes then has its share of the memory. ``chosen``: the numbers that were chosen
    before, which stay. A model of unknown size is taken to fit. A recipe whose model cannot be read stays as it is:
    the plan reports that.
    """
    if recipe.cuts_only_vocabulary and recipe.calibration.self_generated == "auto":
        return _with(recipe, 0)  # nothing is scored or refit
    calibration, recovery = chosen.calibration, chosen.recovery
    recover = recipe.recover if recipe.recover and recipe.recover.data.self_generated == "auto" else None
    is_open = calibration is None and recipe.calibration.self_generated == "auto", recovery is None and recover
    if any(is_open):
        try:
            known = headers_of(recipe.model)  # a plan reads no weights to find their size
            fits = not known or whole_model_bytes(recipe.model) <= memory_for_models(recipe.model) // starts
            fits = broadcast_from_first(fits)
        except LLMPruneError:
            return recipe
        calibration = recipe.calibration.generated * fits if calibration is None else calibration
        if recover is not None and recovery is None:
            recovery = recover.generated(window_length(recipe)) * fits
    if recipe.calibration.self_generated == "auto" and calibration is not None:
        recipe = _with(recipe, calibration)
    return _with_recovery(recipe, recovery) if recover is not None and recovery is not None else recipe


def window_length(recipe: Recipe) -> int:
    """Return the tokens of a window of the training after the cut."""
    assert recipe.recover is not None, "it has no windows without the section"
    length = recipe.recover.data.resolved(recipe.calibration).sequence_length
    assert length is not None, "resolved windows have a length"
    return length


def _with(recipe: Recipe, generated: int) -> Recipe:
    calibration = recipe.calibration.model_copy(update={"self_generated": generated})
    return recipe.model_copy(update={"calibration": calibration})


def _with_recovery(recipe: Recipe, generated: int) -> Recipe:
    assert recipe.recover is not None, "the section is there"
    own = SelfGenerated(samples=generated) if generated else False
    data = recipe.recover.data.model_copy(update={"self_generated": own})
    return recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"data": data})})


def about_self_generated(recipe: Recipe, settled: Recipe) -> list[str]:
    """Return a note where the model would write windows itself but is too large for that."""
    wanted = 0 if recipe.cuts_only_vocabulary else recipe.calibration.generated
    notes = []
    if wanted and not settled.calibration.generated:
        notes.append(
            "the dense model writes no calibration windows itself, because its devices cannot hold all of it; "
            f"calibration.self_generated: {wanted} has it write them nevertheless, slowly"
        )
    recover = recipe.recover
    wanted = recover.generated(window_length(recipe)) if recover else 0
    if recover and wanted and settled.recover and not settled.recover.data.self_generated:
        notes.append(
            "the dense model writes no windows for recover itself, because its devices cannot hold all of it; "
            f"recover.data.self_generated: {wanted} has it write them nevertheless, slowly"
        )
    return notes
