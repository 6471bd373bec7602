"""Sizes and choice of the tokens that a recipe keeps.

Shapes: K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.anatomy.vocabulary import find_vocabulary, named_ids
from llmprune.checkpoint.file_names import Dtypes
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.vocabulary.tokenizer_files import ids_in_files
from llmprune.common.errors import RecipeError
from llmprune.data.sources import local_bytes
from llmprune.data.vocabulary.choice import VocabularyTarget, choose_tokens
from llmprune.data.vocabulary.required import RequiredTokens, required_tokens
from llmprune.data.vocabulary.segmentation import Segmentation, read_state
from llmprune.data.vocabulary.text import CountedText, count_tokens
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import TextSource
from llmprune.results.figures.base import Figures
from llmprune.results.figures.model_size import Size

if TYPE_CHECKING:
    from llmprune.planning.base import Base

_STEP = 128  # tokens, as tensor cores and tensor parallelism like a dimension
_QUICK = 4 * 10**6  # characters that a plan counts; a run counts all


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


@dataclass(frozen=True)
class ChosenVocabulary:
    """Ids of the tokens kept, ascending, int64 [K], out of ``tokens``; why some must stay, and the counted text."""

    tokens: int
    keep_K: Tensor
    required: RequiredTokens
    text: CountedText

    @property
    def coverage(self) -> float:
        """Share of the token occurrences in the held-out documents that the kept tokens make up."""
        return self.text.coverage(self.keep_K)


def vocabulary_sources(recipe: Recipe) -> tuple[TextSource, ...]:
    """Return the sources whose text a vocabulary is kept for. Raises RecipeError where there is none."""
    assert recipe.vocabulary is not None, "the recipe has the section"
    texts = tuple(source for source in recipe.calibration.text_sources() if not source.images_field)
    found = recipe.vocabulary.keep_for or texts
    if not found:
        raise RecipeError(
            "vocabulary.keep_for: the calibration reads no text without images; name sources of text, such as "
            "[{dataset: texts.txt}]"
        )
    return found


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
        _require_removal(recipe, target, kept=target.number)
    return target.number


def target_of(recipe: Recipe, tokens: int) -> VocabularyTarget:
    """Return the size that a recipe asks for, of a vocabulary of ``tokens`` tokens."""
    settings = recipe.vocabulary
    assert settings is not None, "the recipe has the section"
    multiple = settings.multiple or min(tokens & -tokens, _STEP)
    wanted = settings.keep * tokens if settings.keep is not None else settings.tokens
    target = VocabularyTarget(tokens, multiple, coverage=settings.wanted_coverage)
    return target if wanted is None else replace(target, number=target.rounded(ceil(wanted)))


def choose_vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, config: Config) -> ChosenVocabulary:
    """Count the text of a recipe's vocabulary and choose the tokens. Raises RecipeError where none is removed."""
    assert recipe.vocabulary is not None, "the recipe has the section"
    tokens = text_config(config).vocab_size
    segmentation = Segmentation(read_state(tokenizer))
    if max(tokenizer.get_vocab().values()) >= tokens:
        raise RecipeError(
            f"vocabulary: the tokenizer has ids up to {max(tokenizer.get_vocab().values()):,} and the model knows "
            f"{tokens:,} tokens; use this model's tokenizer, or remove vocabulary"
        )
    named = named_ids(config.to_dict(), tokens) | ids_in_files(folder_of(recipe.model, "tokenizer"), tokens)
    required = required_tokens(tokenizer, segmentation, named=named)
    target = target_of(recipe, tokens)
    target.require(required)
    text = count_tokens(
        vocabulary_sources(recipe),
        tokenizer,
        settings=recipe.vocabulary,
        seed=recipe.calibration.seed,
        tokens=tokens,
    )
    keep_K = choose_tokens(text, segmentation, required=required, target=target)
    _require_removal(recipe, target, kept=len(keep_K))
    return ChosenVocabulary(tokens, keep_K, required, text)


def is_quick(recipe: Recipe) -> bool:
    """Check that the text of a recipe's vocabulary is on this machine and small enough for a plan to count it."""
    assert recipe.vocabulary is not None, "the recipe has the section"
    sizes = [local_bytes(source) for source in vocabulary_sources(recipe)]
    local = [size for size in sizes if size is not None]
    return len(local) == len(sizes) and min(sum(local), recipe.vocabulary.characters) <= _QUICK


def with_tokens(plan: VocabularyPlan, chosen: ChosenVocabulary) -> VocabularyPlan:
    """Return the plan of a vocabulary whose tokens are chosen."""
    update = {"kept": len(chosen.keep_K), "required": len(chosen.required.all), "coverage": chosen.coverage}
    return plan.model_copy(update=update)


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


def _require_removal(recipe: Recipe, target: VocabularyTarget, *, kept: int) -> None:
    """Raise RecipeError where a cut keeps every token."""
    if kept < target.tokens or (recipe.vocabulary and recipe.vocabulary.keep == 1):
        return
    why = f"are needed to cover {target.coverage:.6g} of the text" if target.coverage else "are kept"
    step = f", in multiples of {target.multiple}" if target.multiple > 1 else ""
    raise RecipeError(
        f"vocabulary: all {target.tokens:,} tokens {why}{step}; ask for a lower coverage or fewer tokens, name more "
        "text in keep_for, or remove vocabulary"
    )
