"""Turn the hidden size that a recipe asks for into a number of residual channels that the model's config accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.anatomy.types import Anatomy, HiddenSize
from llmprune.common.errors import RecipeError
from llmprune.recipe.hidden import Hidden
from llmprune.recipe.recipe import Recipe

_NEAR = 0.03  # of the dense size: how far a fraction is rounded for a number that hardware likes
_MOST = 128  # multiple that is looked for


@dataclass(frozen=True)
class PlannedHidden:
    """Residual channels kept, None where all are; and notes on the rounding."""

    size: int | None = None
    notes: tuple[str, ...] = ()


ALL_CHANNELS = PlannedHidden()


def planned_hidden(recipe: Recipe, anatomy: Anatomy) -> PlannedHidden:
    """Return the residual channels to keep. Raises RecipeError for what the model or another section does not allow."""
    if recipe.hidden is None:
        return ALL_CHANNELS
    if recipe.sparsity is not None:
        raise RecipeError(
            "hidden: the repair of a smaller hidden size changes all weights, which would undo the zeros of sparsity; "
            "remove one of the two, or run sparsity on the result of a run with hidden"
        )
    if recipe.recover is not None and recipe.recover.rounds > 1:
        raise RecipeError("hidden: the hidden size is cut in one round; set recover.rounds to 1, or remove hidden")
    found = anatomy.hidden
    if found is None or found.refusal:
        reason = found.refusal if found else "they were not looked for"
        raise RecipeError(f"hidden: no residual channels of this model can be removed: {reason}; remove the section")
    kept = _kept(recipe.hidden, found)
    if kept == found.size:
        return ALL_CHANNELS
    notes = _about_rounding(recipe.hidden, kept, found=found)
    return PlannedHidden(kept, (*notes, *_about_multiple(kept, found)))


def _kept(hidden: Hidden, found: HiddenSize) -> int:
    accepted = (*found.possible, found.size)
    if isinstance(hidden.keep, int):
        if hidden.keep not in accepted:
            raise RecipeError(_problem(hidden.keep, found, accepted=accepted))
        return hidden.keep
    wanted = hidden.keep * found.size
    if hidden.keep == 1:
        return found.size
    if hidden.multiple is not None:
        accepted = tuple(size for size in accepted if size % hidden.multiple == 0)
        if not accepted:
            raise RecipeError(
                f"hidden.multiple: the config accepts no hidden size below {found.size} that is a multiple of "
                f"{hidden.multiple}; take a divisor of {found.possible[-1]}, or leave it out"
            )
        return min(accepted, key=lambda size: (abs(size - wanted), -size))
    near = [size for size in found.possible if abs(size - wanted) <= _NEAR * found.size]
    near = near or [min(found.possible, key=lambda size: abs(size - wanted))]
    return max(near, key=lambda size: (min(size & -size, _MOST), -abs(size - wanted)))


def _problem(kept: int, found: HiddenSize, *, accepted: Sequence[int]) -> str:
    if kept > found.size:
        return f"hidden.keep: {kept} is more than the hidden size {found.size}; keep at most that"
    nearest = sorted(sorted(accepted, key=lambda size: abs(size - kept))[:2])
    return (
        f"hidden.keep: the config of the model accepts no {found.field} {kept}; the nearest that it accepts: "
        f"{' and '.join(map(str, nearest))}"
    )


def _about_rounding(hidden: Hidden, kept: int, *, found: HiddenSize) -> tuple[str, ...]:
    if not isinstance(hidden.keep, float) or abs(hidden.keep * found.size - kept) < 1:
        return ()
    return (f"hidden: {hidden.keep:g} of {found.size} residual channels is rounded to {kept}",)


def _about_multiple(kept: int, found: HiddenSize) -> tuple[str, ...]:
    """Warn of a hidden size that kernels and quantisers take less well than the dense one."""
    power, dense = min(kept & -kept, _MOST), min(found.size & -found.size, _MOST)
    if power >= dense or power >= 64:
        return ()
    return (
        f"hidden: {kept} is a multiple of {power} and the dense {found.size} of {dense}: matrix kernels are slower, "
        f"and quantisers with groups of {dense} do not take it",
    )
