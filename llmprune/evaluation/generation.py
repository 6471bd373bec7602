"""Degeneration of free greedy generation, which multiple-choice scores do not show.

Repetition is the share of tokens that complete a repeated 4-gram (rep-n of Welleck et al., arXiv 1908.04319). A loop is
a text that ends with the same sequence of at most 16 tokens at least three times. Small models also loop when dense, so
the dense model and the text's own continuation are measured for comparison.

Shapes: N prompts, B batch, P prompt tokens, L all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from llmprune.common.errors import RecipeError
from llmprune.common.out_of_memory import BatchSize
from llmprune.evaluation.decoding import Greedy, end_tokens, generate
from llmprune.recipe.evaluation import Generation
from llmprune.results.evaluation_figures import Example, FreeText, GenerationFigures

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GRAM = 4  # tokens
_MAX_PERIOD, _MIN_REPEATS = 16, 3  # tokens of a loop, and how often it occurs
_EXAMPLES = 4  # shown in the report


@dataclass(frozen=True)
class Continuations:
    """New token ids of each prompt by both models, up to the first end token."""

    dense: list[list[int]]
    pruned: list[list[int]]


def continue_windows(
    model: PreTrainedModel, windows_NL: Tensor, *, settings: Generation, side: str, reductions: list[str]
) -> list[list[int]]:
    """Continue the beginnings of held-out windows, greedily; return the new token ids up to the first end token.

    ``reductions`` gets a sentence where a device runs out of memory and the batch is halved. Raises RecipeError if the
    windows are too few or too short.
    """
    require_windows(settings, (windows_NL.shape[0], windows_NL.shape[1]))
    prompts_NP = windows_NL[: settings.samples, : settings.prompt_tokens]
    ends = end_tokens(model)
    greedy = Greedy(settings.new_tokens, ends)

    def work(batch_size: int) -> list[list[int]]:
        texts = []
        for ids_BP in torch.split(prompts_NP, batch_size):
            output_BL = generate(model, ids_BP, settings=greedy)
            texts += [_until(row, ends) for row in output_BL[:, ids_BP.shape[1] :].tolist()]
        return texts

    batch = BatchSize(settings.batch_size, "prompts", alone=True, reductions=reductions)
    return batch.run(f"free generation of the {side} model", work)


def compare_generation(
    continued: Continuations,
    windows_NL: Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Generation,
) -> GenerationFigures:
    """Compare the continuations of the windows' beginnings by both models, and by the text itself."""
    prompts_NP = windows_NL[: settings.samples, : settings.prompt_tokens]
    texts = {
        "dense": continued.dense,
        "pruned": continued.pruned,
        "text": windows_NL[: settings.samples, settings.prompt_tokens :][:, : settings.new_tokens].tolist(),
    }
    assert tokenizer is not None, "loaded with the run's inputs"
    written = {name: tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
    prompts = tokenizer.batch_decode(prompts_NP, skip_special_tokens=True)
    return GenerationFigures(
        **{name: describe(ids, written[name]) for name, ids in texts.items()},
        samples=len(prompts),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        examples=tuple(
            Example(prompt=prompts[index], dense=written["dense"][index], pruned=written["pruned"][index])
            for index in range(min(_EXAMPLES, len(prompts)))
        ),
    )


def require_windows(settings: Generation, shape: tuple[int, int]) -> None:
    """Raise RecipeError if held-out text of this shape (windows, tokens) has too few prompts or continuations."""
    count, length = shape
    if settings.samples > count:
        raise RecipeError(
            f"evaluation.generation: {settings.samples} prompts, and the held-out text has {count} windows; "
            "lower generation.samples or raise perplexity.samples"
        )
    if settings.prompt_tokens + settings.new_tokens > length:
        raise RecipeError(
            f"evaluation.generation: prompt_tokens {settings.prompt_tokens} + new_tokens {settings.new_tokens} "
            f"exceed the {length} tokens of a held-out window; shorten one, or raise perplexity.sequence_length"
        )


def describe(ids: Sequence[Sequence[int]], texts: Sequence[str]) -> FreeText:
    """Compute the statistics of texts, given as token ids without end tokens and decoded."""
    return FreeText(
        repetition=fmean(map(repetition, ids)),
        loops=fmean(map(ends_in_loop, ids)),
        empty=fmean(not any(character.isalnum() for character in text) for text in texts),
        tokens=fmean(map(len, ids)),
    )


def repetition(ids: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before in the text; 0 if there are fewer than two."""
    grams = list(zip(*(ids[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Check that the text ends with a sequence of at most 16 tokens, three times or more."""
    return any(
        len(ids) >= period * _MIN_REPEATS and list(ids[-period * _MIN_REPEATS :]) == list(ids[-period:]) * _MIN_REPEATS
        for period in range(1, _MAX_PERIOD + 1)
    )


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    return next((ids[:index] for index, token in enumerate(ids) if token in ends), ids)
