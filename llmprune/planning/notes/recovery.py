"""Notes on the training after the cut, and what a plan refuses about it."""

from __future__ import annotations

from llmprune.common.errors import RecipeError
from llmprune.planning.recovery.memory import length_of
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover

_OF_DISTILLATION = ("top_k", "temperature", "hidden_states")


def require_a_step(recover: Recover, *, length: int) -> None:
    """Raise RecipeError where the tokens are fewer than those of one optimiser step."""
    if recover.tokens is None:
        return
    windows = recover.windows_of_step(recover.tokens, length)
    if recover.tokens < windows * length:
        raise RecipeError(
            f"recover.tokens: {recover.tokens:,} tokens are fewer than one step, which has {windows * length:,} "
            f"({windows} × {length}); ask for at least {windows * length:,}, or lower recover.batch_tokens or "
            "recover.data.sequence_length"
        )


def about_recovery(recipe: Recipe, *, is_cut: bool) -> list[str]:
    """Return notes on a training of a whole model, and on settings that the method or the loss does not use.

    ``is_cut``: whether anything is removed. Raises RecipeError where the tokens are fewer than one step.
    """
    recover = recipe.recover
    if recover is None:
        return []
    require_a_step(recover, length=length_of(recover.data.resolved(recipe.calibration)))
    notes = []
    if not (is_cut or recover.against):
        notes.append("recover: nothing is cut, so that the training is plain fine-tuning of the whole model")
    given = recover.model_fields_set
    if "lora" in given and recover.method != "lora":
        notes.append(f"recover.lora: not used with method: {recover.method}; remove it, or set method: lora")
    unused = [key for key in _OF_DISTILLATION if key in given and getattr(recover, key)]
    if unused and recover.loss == "language_model":
        listed = ", ".join(f"recover.{key}" for key in unused)
        notes.append(f"{listed}: not used with loss: language_model; remove, or set loss: distillation")
    return notes + _about_schedule(recover, length=length_of(recover.data.resolved(recipe.calibration)))


def _about_schedule(recover: Recover, *, length: int) -> list[str]:
    if recover.tokens is None:
        return []
    steps, every = recover.steps(recover.tokens, length), recover.check_every
    if every == "auto" or every <= steps:
        return []
    return [f"recover.check_every: {every} steps are more than the {steps} of the training, which is judged at its end"]
