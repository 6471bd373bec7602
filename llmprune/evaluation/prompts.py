"""Prompts of the generation check: beginnings of held-out windows, or llmprune's own questions.

Shapes: N windows, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from llmprune.common.errors import RecipeError
from llmprune.data.begin_of_text import begin_tokens
from llmprune.recipe.evaluation import Generation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a model's inputs: positions of a sequence (None: any number), token ids of its vocabulary."""

    positions: int | None
    vocabulary: int


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, and how the held-out text goes on after it (None for questions)."""

    ids: tuple[Ids, ...]
    new_tokens: int  # generated after each prompt at most
    source: str
    text: tuple[Ids, ...] | None = None


def make_prompts(
    settings: Generation,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    held_out_NL: Tensor | None,
    limits: ModelLimits,
    begin: Ids | None = None,
) -> Prompts:
    """Return the prompts that the settings ask for; see the recipe key ``prompts``.

    ``begin``: the ids that questions begin with, empty for none; None: those that the tokenizer puts in front of a
    text. A question has them once, whether or not the chat template writes them, as in llama.cpp and lm-eval;
    ``vllm serve`` adds none to what the template writes.
    Raises RecipeError where held-out text has too few windows, or they are too short, or there is no tokenizer.
    """
    if tokenizer is None:
        raise RecipeError(
            "evaluation.generation: the model has no tokenizer, which reads prompts and writes answers; add one to its "
            "folder, or set evaluation.generation to false"
        )
    asks_windows = settings.prompts == "held_out" or (settings.prompts == "auto" and not tokenizer.chat_template)
    if asks_windows and held_out_NL is not None:
        shape = held_out_NL.shape[0], held_out_NL.shape[1]
        if settings.prompts == "held_out":
            require_windows(settings, shape)
        if not list(_missing(settings, shape)):
            return _of_windows(settings, held_out_NL)
    return _of_questions(settings, tokenizer, begin=begin, limits=limits)


def require_windows(settings: Generation, shape: tuple[int, int]) -> None:
    """Raise RecipeError if held-out text of this shape (windows, tokens) has too few prompts or continuations."""
    if problems := list(_missing(settings, shape)):
        raise RecipeError(problems)


def _missing(settings: Generation, shape: tuple[int, int]) -> Iterator[str]:
    count, length = shape
    if settings.samples > count:
        yield (
            f"evaluation.generation: {settings.samples} prompts, and the held-out text has {count} windows; "
            "lower generation.samples or raise perplexity.samples"
        )
    if settings.prompt_tokens + settings.new_tokens > length:
        yield (
            f"evaluation.generation: prompt_tokens {settings.prompt_tokens} + new_tokens {settings.new_tokens} "
            f"exceed the {length} tokens of a held-out window; shorten one, or raise perplexity.sequence_length"
        )


def _of_windows(settings: Generation, windows_NL: Tensor) -> Prompts:
    rows = windows_NL[: settings.samples, : settings.prompt_tokens + settings.new_tokens].tolist()
    return Prompts(
        tuple(tuple(row[: settings.prompt_tokens]) for row in rows),
        settings.new_tokens,
        "held-out text",
        tuple(tuple(row[settings.prompt_tokens :]) for row in rows),
    )


def _of_questions(
    settings: Generation, tokenizer: PreTrainedTokenizerBase, *, begin: Ids | None, limits: ModelLimits
) -> Prompts:
    """Return questions as token ids; their ends are cut off where the model has very few positions."""
    texts = _questions()
    if settings.samples > len(texts):
        raise RecipeError(
            f"evaluation.generation: {settings.samples} prompts, and there are {len(texts)} questions; lower "
            "generation.samples, or set generation.prompts to held_out"
        )
    has_template = bool(tokenizer.chat_template)
    write = _in_chat if has_template else _plain
    ids = [write(tokenizer, text) for text in texts[: settings.samples]]
    own = begin_tokens(tokenizer)
    ids = [begun(row, own if begin is None else begin, own=own) for row in ids]
    if not all(ids):
        raise RecipeError(
            "evaluation.generation: the tokenizer or its chat template makes nothing of a question; save the model's "
            "own tokenizer beside it, or set evaluation.generation to false"
        )
    if max(map(max, ids)) >= limits.vocabulary:
        raise RecipeError(
            f"evaluation.generation: the tokenizer gives ids up to {max(map(max, ids))} and the model knows 0 to "
            f"{limits.vocabulary - 1}; use this model's tokenizer"
        )
    new_tokens = settings.new_tokens
    if limits.positions is not None:
        new_tokens = min(new_tokens, limits.positions // 2)
        ids = [row[: limits.positions - new_tokens] for row in ids]
    return Prompts(tuple(ids), new_tokens, "questions in the chat template" if has_template else "questions")


@cache
def _questions() -> tuple[str, ...]:
    return tuple((files("llmprune.evaluation") / "questions.txt").read_text("utf-8").splitlines())


def _in_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Return a question as a conversation, with the special tokens that the template writes and no others."""
    from jinja2 import TemplateError

    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise RecipeError(
            f"evaluation.generation: the tokenizer's chat template cannot write a question ({error}); set "
            "generation.prompts to held_out"
        ) from error
    return tuple(tokenizer(written, add_special_tokens=False)["input_ids"])


def begun(ids: Ids, begin: Ids, *, own: Ids) -> Ids:
    """Return a prompt that begins with ``begin``, once, in place of the ids ``own`` of the tokenizer."""
    written = next((start for start in (begin, own) if start and ids[: len(start)] == start), ())
    return begin + ids[len(written) :]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    return tuple(tokenizer(f"Question: {text}\nAnswer:")["input_ids"])
