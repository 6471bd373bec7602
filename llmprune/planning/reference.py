"""The reference model of a run: compared with the result, where it is not the pruned model itself."""

from __future__ import annotations

from llmprune.anatomy.meta_model import text_config
from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.common.errors import ModelError, RecipeError
from llmprune.data.vocabulary.counterparts import ModelTokens, counterparts
from llmprune.planning.base import describe_base
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.model_size import Size


def without_reference(recipe: Recipe) -> Recipe:
    """Return the recipe without another model to compare with, where that cannot be found."""
    sections = {"recover": recipe.recover, "evaluation": recipe.evaluation}
    return recipe.with_chosen(
        {name: section.model_copy(update={"against": None}) for name, section in sections.items() if section}
    )


def key_of_reference(recipe: Recipe) -> str:
    """Return the recipe's key that names another model to compare with."""
    return "recover.against" if recipe.recover and recipe.recover.against else "evaluation.against"


def size_of_reference(recipe: Recipe) -> Size:
    """Return the sizes of the model ``against``. Raises ModelError where it cannot be read."""
    other = recipe.model_copy(update={"model": recipe.reference})
    try:
        return describe_base(other, load_config(other.model)).size
    except ModelError as error:
        raise ModelError(f"{key_of_reference(recipe)}: {error}") from error


def ids_in_reference(recipe: Recipe) -> list[int] | None:
    """Return the id in the model ``against`` of every token of the model that is trained; None where all are the same.

    Raises RecipeError where that model has other tokens.
    """
    own, other = (
        ModelTokens(load_tokenizer(source), text_config(load_config(source)).vocab_size)
        for source in (recipe.model, recipe.reference)
    )
    found = counterparts(own, other)
    if isinstance(found, str):
        raise RecipeError(
            f"{recipe.reference.id} {found}, and {recipe.model.id} can only be compared with a model that has its "
            "tokens; give the model that it was pruned from"
        )
    return None if found == list(range(other.rows)) else found


def about_reference(recipe: Recipe) -> list[str]:
    """Return the note on a model ``against`` that has more tokens than the pruned one."""
    if recipe.reference == recipe.model:
        return []
    own, other = (text_config(load_config(source)).vocab_size for source in (recipe.model, recipe.reference))
    if own == other:
        return []
    return [
        f"{recipe.reference.id} has {other:,} tokens in its vocabulary and {recipe.model.id} {own:,}: its "
        f"probabilities are taken over these {own:,} alone, and its tasks are evaluated with its own tokenizer"
    ]


def require_matching_layers(recipe: Recipe) -> None:
    """Raise RecipeError where ``recover.hidden_states`` cannot tell which layers of two models belong together."""
    if recipe.recover is None or not recipe.recover.hidden_states:
        return
    configs = [load_config(source) for source in (recipe.model, recipe.reference)]
    own, other = describe_base(recipe, configs[0]).size.layers, size_of_reference(recipe).layers
    if own != other:
        raise RecipeError(
            f"recover.hidden_states compares layer by layer, and {recipe.model.id} has {own} layers while "
            f"{recipe.reference.id} has {other}: which of them were removed is not known; remove "
            "recover.hidden_states, or prune and recover in one run"
        )
    widths = [text_config(config).hidden_size for config in configs]
    if widths[0] != widths[1]:
        raise RecipeError(
            f"recover.hidden_states: the hidden size of {recipe.reference.id} is {widths[1]:,}, not {widths[0]:,}, so "
            "that hidden states cannot be compared; remove it"
        )
