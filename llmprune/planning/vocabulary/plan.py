"""Plan the cut of a vocabulary: the number of tokens kept, and what each takes in embedding and head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from transformers import PreTrainedModel

from llmprune.anatomy.vocabulary import find_vocabulary
from llmprune.checkpoint.file_names import Dtypes
from llmprune.common.errors import RecipeError
from llmprune.data.vocabulary.choice import VocabularyTarget
from llmprune.planning.base import Base
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures
from llmprune.results.figures.model_size import Size

_STEP = 128  # tokens, as tensor cores and tensor parallelism like a dimension


class VocabularyPlan(Figures):
    """Tokens of the dense model and those kept, with what each token takes in embedding and head.

    ``kept``: None until the text is counted; ``required``, ``coverage``: of the chosen tokens, None before.
    """

    tokens: int
    kept: int | None
    required: int | None = None
    coverage: float | None = None
    parameters_of_token: int
    bytes_of_token: int


@dataclass(frozen=True)
class TokenSizes:
    """Number of a model's ``tokens``, and what each takes in embedding and head. ``bytes``: in the files."""

    tokens: int
    parameters: int
    bytes: int


def planned_vocabulary(recipe: Recipe, base: Base, *, stored: Dtypes) -> VocabularyPlan | None:
    """Return the tokens of a recipe's cut, and what each takes; None without the section.

    ``stored``: types of the saved tensors, by name. Raises ModelError where the model's vocabulary cannot be cut,
    RecipeError for a number that removes none.
    """
    if recipe.vocabulary is None:
        return None
    token = token_sizes(base.dense, stored=stored, trust_remote_code=recipe.model.trust_remote_code)
    return VocabularyPlan(
        tokens=token.tokens,
        kept=stated_number(recipe, token.tokens),
        parameters_of_token=token.parameters,
        bytes_of_token=token.bytes,
    )


def token_sizes(model: PreTrainedModel, *, stored: Dtypes, trust_remote_code: bool) -> TokenSizes:
    """Return what each token of a model on the meta device takes. Raises ModelError where none can be removed."""
    found = find_vocabulary(model, trust_remote_code=trust_remote_code)
    tensors = {name: tensor for name, tensor in model.named_parameters() if name in found.dims}  # tied ones once
    of_token = {name: tensor.numel() // found.tokens for name, tensor in tensors.items()}
    size = sum(number * stored.get(name, tensors[name].dtype).itemsize for name, number in of_token.items())
    return TokenSizes(found.tokens, sum(of_token.values()), size)


def stated_number(recipe: Recipe, tokens: int) -> int | None:
    """Return the number of tokens that a recipe states, rounded; None where the coverage of its text decides.

    ``tokens``: of the dense model. Raises RecipeError for a number that removes none.
    """
    target = target_of(recipe, tokens)
    if target.number is not None:
        require_removal(recipe, target, kept=target.number)
    return target.number


def target_of(recipe: Recipe, tokens: int) -> VocabularyTarget:
    """Return the size that a recipe asks for, of a vocabulary of ``tokens`` tokens."""
    settings = recipe.vocabulary
    assert settings is not None, "the recipe has the section"
    multiple = settings.multiple or min(tokens & -tokens, _STEP)
    wanted = settings.keep * tokens if settings.keep is not None else settings.tokens
    target = VocabularyTarget(tokens, multiple, coverage=settings.wanted_coverage)
    return target if wanted is None else replace(target, number=target.rounded(ceil(wanted)))


def cut_size(size: Size, plan: VocabularyPlan) -> Size:
    """Return the size of a model whose whole vocabulary ``size`` counts, after the cut of its tokens."""
    if plan.kept is None:
        return size
    removed = plan.tokens - plan.kept
    return size.model_copy(
        update={
            "parameters": size.parameters - removed * plan.parameters_of_token,
            "bytes": size.bytes - removed * plan.bytes_of_token,
            "vocabulary": plan.kept,
        }
    )


def require_removal(recipe: Recipe, target: VocabularyTarget, *, kept: int) -> None:
    """Raise RecipeError where a cut keeps every token."""
    if kept < target.tokens or (recipe.vocabulary and recipe.vocabulary.keep == 1):
        return
    why = f"are needed to cover {target.coverage:.6g} of the text" if target.coverage else "are kept"
    step = f", in multiples of {target.multiple}" if target.multiple > 1 else ""
    raise RecipeError(
        f"vocabulary: all {target.tokens:,} tokens {why}{step}; ask for a lower coverage or fewer tokens, name more "
        "text in keep_for, or remove vocabulary"
    )
