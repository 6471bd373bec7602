"""Choose the tokens that a recipe keeps, by its text.

Shapes: K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.anatomy.meta_model import Config, text_config
from llmprune.anatomy.vocabulary import named_ids
from llmprune.checkpoint.location import folder_of
from llmprune.checkpoint.vocabulary.tokenizer_files import ids_in_files
from llmprune.common.errors import RecipeError
from llmprune.data.sources import local_bytes
from llmprune.data.vocabulary.choice import choose_tokens
from llmprune.data.vocabulary.required import RequiredTokens, required_tokens
from llmprune.data.vocabulary.segmentation import Segmentation, read_state
from llmprune.data.vocabulary.text import CountedText, count_tokens
from llmprune.planning.vocabulary.plan import VocabularyPlan, require_removal, target_of
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import TextSource

_QUICK = 4 * 10**6  # characters that a plan counts; a run counts all


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
    require_removal(recipe, target, kept=len(keep_K))
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
