"""Free generation, watched for collapse: a model can keep its multiple-choice scores and still write in circles.

Repetition is the share of tokens that complete a sequence of four tokens that the text already had (the rep-n of
Welleck et al., arXiv 1908.04319). A loop is an end that repeats the same up to 16 tokens at least three times.
Greedy decoding makes small models loop, so the dense model and the text's own continuation are there to compare with.

Shapes: N prompts, B batch, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from llmprune.common.errors import RecipeError
from llmprune.evaluation.bench.generation_speed import input_device
from llmprune.evaluation.decoding import default_settings
from llmprune.recipe.evaluation import Generation
from llmprune.results.evaluation_figures import Example, FreeText, GenerationFigures

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GRAM = 4  # tokens of a sequence whose return counts as repetition
_PERIOD, _TIMES = 16, 3  # a loop: at most so many tokens, at least so many times
_EXAMPLES = 4


def compare_generation(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    windows_NL: Tensor,
    settings: Generation,
) -> GenerationFigures:
    """Both models continue the beginnings of the windows, greedily.

    Raises RecipeError where there are too few windows, or where they are too short to compare with.
    """
    require_windows(settings, (windows_NL.shape[0], windows_NL.shape[1]))
    prompts_NP = windows_NL[: settings.samples, : settings.prompt_tokens]
    texts = {
        "dense": _continue(dense, prompts_NP, settings=settings),
        "pruned": _continue(pruned, prompts_NP, settings=settings),
        "text": windows_NL[: settings.samples, settings.prompt_tokens :][:, : settings.new_tokens].tolist(),
    }
    assert tokenizer is not None, "the workbench loads it or raises"
    written = {name: tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
    prompts = tokenizer.batch_decode(prompts_NP, skip_special_tokens=True)
    return GenerationFigures(
        **{name: describe(ids, written[name]) for name, ids in texts.items()},
        samples=len(prompts),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        examples=tuple(
            Example(prompt=prompt, dense=before, pruned=after)
            for prompt, before, after in list(zip(prompts, written["dense"], written["pruned"], strict=True))[
                :_EXAMPLES
            ]
        ),
    )


def require_windows(settings: Generation, shape: tuple[int, int]) -> None:
    """Raise RecipeError unless held-out text of this shape (N, L) has the prompts, with something after them."""
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
    """Figures of what one model wrote: its token ids, without end tokens, and the same as text."""
    return FreeText(
        repetition=fmean(map(repetition, ids)),
        loops=fmean(map(ends_in_loop, ids)),
        empty=fmean(not any(letter.isalnum() for letter in text) for text in texts),
        tokens=fmean(map(len, ids)),
    )


def repetition(ids: Sequence[int]) -> float:
    """Share of the sequences of four tokens that were there before; 0 for a text too short to have two."""
    grams = list(zip(*(ids[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the end is one sequence of at most 16 tokens, three times or more."""
    return any(
        len(ids) >= period * _TIMES and list(ids[-period * _TIMES :]) == list(ids[-period:]) * _TIMES
        for period in range(1, _PERIOD + 1)
    )


def _continue(model: PreTrainedModel, prompts_NP: Tensor, *, settings: Generation) -> list[list[int]]:
    """New token ids of each prompt, up to its first end token."""
    from transformers import GenerationConfig

    ends = _ends(model)
    greedy = GenerationConfig(
        max_new_tokens=settings.new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    found = []
    device = input_device(model)
    for ids_BP in torch.split(prompts_NP, settings.batch_size):
        ids_BP = ids_BP.to(device)
        with torch.no_grad(), default_settings(model):
            out_BL = model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=greedy)
        found += [_until(row, ends) for row in out_BL[:, ids_BP.shape[1] :].tolist()]
    return found


def _ends(model: PreTrainedModel) -> set[int]:
    """The token ids that end a text."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    own = model.config.get_text_config().eos_token_id if own is None else own
    return set() if own is None else {own} if isinstance(own, int) else set(own)


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
