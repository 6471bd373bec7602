"""Degeneration of free greedy generation, which multiple-choice scores do not show.

Repetition is the share of tokens that complete a repeated 4-gram (rep-n of Welleck et al., arXiv 1908.04319). A loop is
a text that ends with the same sequence of at most 16 tokens at least three times. Small models also loop when dense, so
the dense model and the text's own continuation are measured for comparison.

Shapes: B prompts of a batch, P tokens of the longest, L all tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from llmprune.common.out_of_memory import BatchSize
from llmprune.evaluation.decoding import Greedy, end_tokens, generate
from llmprune.evaluation.lm_eval.harness import EvaluatedModel
from llmprune.evaluation.prompts import Ids, Prompts
from llmprune.recipe.evaluation import Generation
from llmprune.results.figures.base import Figures
from llmprune.results.figures.evaluation import Example, FreeText, GenerationFigures, GreedyAnswer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GRAM = 4  # tokens
_MAX_PERIOD, _MIN_REPEATS = 16, 3  # tokens of a loop, and how often it occurs
_EXAMPLES = 4  # shown in the report


class Answers(Figures):
    """Greedy answers of one model, one for each prompt."""

    answers: tuple[GreedyAnswer, ...]


def answer_prompts(
    model: EvaluatedModel, side: str, *, prompts: Prompts, settings: Generation
) -> tuple[GreedyAnswer, ...]:
    """Return the greedy answers of a model, from its result store or generated now. ``side``: dense or pruned."""
    parts = prompts.ids, prompts.new_tokens, settings.batch_size, [version(name) for name in ("torch", "transformers")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    known = model.store.load("greedy answers", key, kind=Answers)
    if known is None:
        written = continue_prompts(
            model.whole.get(), prompts, batch_size=settings.batch_size, side=side, reductions=model.whole.reductions
        )
        known = Answers(answers=written)
        model.store.save("greedy answers", known, fingerprint=key)
    return known.answers


def continue_prompts(
    model: PreTrainedModel, prompts: Prompts, *, batch_size: int, side: str, reductions: list[str]
) -> tuple[GreedyAnswer, ...]:
    """Continue prompts greedily up to the first end token.

    ``reductions`` gets a sentence where a device runs out of memory and the batch is halved.
    """
    ends = end_tokens(model)
    greedy = Greedy(prompts.new_tokens, ends)

    def work(size: int) -> tuple[GreedyAnswer, ...]:
        answers: list[GreedyAnswer] = []
        for start in range(0, len(prompts.ids), size):
            ids_BP, mask_BP = _padded(prompts.ids[start : start + size])
            output_BL = generate(model, ids_BP, settings=greedy, mask_BP=mask_BP)
            answers += [_until_end(row, ends) for row in output_BL[:, ids_BP.shape[1] :].tolist()]
        return tuple(answers)

    batch = BatchSize(batch_size, "prompts", alone=True, reductions=reductions)
    return batch.run(f"free generation of the {side} model", work)


def compare_generation(
    dense: Sequence[GreedyAnswer],
    pruned: Sequence[GreedyAnswer],
    *,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None,
) -> GenerationFigures:
    """Compare the answers of both models, and the text itself where the prompts are beginnings of one."""
    assert tokenizer is not None, "without one there are no prompts"
    texts = {"dense": [answer.ids for answer in dense], "pruned": [answer.ids for answer in pruned]}
    written = {name: _decoded(tokenizer, ids) for name, ids in texts.items()}
    asked = _decoded(tokenizer, prompts.ids)
    return GenerationFigures(
        **{name: describe(ids, written[name]) for name, ids in texts.items()},
        text=describe(prompts.text, _decoded(tokenizer, prompts.text)) if prompts.text else None,
        source=prompts.source,
        samples=len(asked),
        prompt_tokens=max(map(len, prompts.ids)),
        new_tokens=prompts.new_tokens,
        examples=tuple(
            Example(prompt=asked[index], dense=written["dense"][index], pruned=written["pruned"][index])
            for index in range(min(_EXAMPLES, len(asked)))
        ),
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


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Ids]) -> list[str]:
    return list(tokenizer.batch_decode(list(map(list, ids)), skip_special_tokens=True))


def _padded(prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, int64 [B, P] each, with padding before shorter prompts."""
    length = max(map(len, prompts))
    missing = [length - len(ids) for ids in prompts]
    rows = [[0] * count + list(ids) for count, ids in zip(missing, prompts, strict=True)]
    masks = [[0] * count + [1] * len(ids) for count, ids in zip(missing, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(masks)


def _until_end(ids: Sequence[int], ends: frozenset[int]) -> GreedyAnswer:
    place = next((index for index, token in enumerate(ids) if token in ends), None)
    return GreedyAnswer(ids=tuple(ids[:place]), end=None if place is None else ids[place])
