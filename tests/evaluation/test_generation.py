"""Free generation: repetition, loops, empty texts, and the model's own generation settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.random_inputs import windows
from helpers.tiny import tiny_tokenizer
from helpers.whole_models import side_by_side

from llmprune.checkpoint.result.verify_worker import generate
from llmprune.common.errors import RecipeError
from llmprune.evaluation.bench.generation_speed import time_generation
from llmprune.evaluation.generation import ends_in_loop, repetition
from llmprune.recipe.evaluation import Generation
from llmprune.testing import tiny_model


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5, 6], 0.0), ([1, 2, 3, 4] * 2, 1 / 5), ([7] * 10, 6 / 7)],
)
def test_repetition(ids: list[int], share: float) -> None:
    """The share of 4-grams that occurred before."""
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [([], False), ([1, 1], False), ([1, 1, 1], True), ([9, 8] + [1, 2, 3] * 3, True), ([1, 2, 3] * 3 + [4], False)],
)
def test_loops(ids: list[int], loops: bool) -> None:
    """A text that ends with three repetitions, whatever precedes them."""
    assert ends_in_loop(ids) is loops


def test_generation_side_by_side() -> None:
    """Both models and the text itself are measured, and examples are decoded."""
    dense, pruned = tiny_model("llama", vocab_size=260), tiny_model("llama", vocab_size=260, seed=1)
    text = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3
    ids = torch.tensor(tiny_tokenizer()(text)["input_ids"])[:200].view(5, 40)
    settings = Generation(prompts="held_out", samples=5, prompt_tokens=8, new_tokens=16, batch_size=2)
    figures = side_by_side(dense, pruned, tokenizer=tiny_tokenizer(), windows_NL=ids, settings=settings)
    assert figures.text is not None
    assert figures.text.tokens == 16
    assert 0 <= figures.dense.repetition <= 1
    assert figures.dense.tokens <= 16
    assert figures.examples[0].prompt == "All happ"
    assert figures.examples[0].dense != figures.examples[0].pruned


def test_empty_texts_are_counted() -> None:
    """A model whose continuations end at once has only empty texts of length 0."""
    silent = tiny_model("llama", vocab_size=260)
    silent.generation_config.eos_token_id = list(range(260))
    ids = torch.randint(250, (4, 40), generator=torch.Generator().manual_seed(0))
    settings = Generation(prompts="held_out", samples=4, prompt_tokens=8, new_tokens=16)
    figures = side_by_side(
        tiny_model("llama", vocab_size=260), silent, tokenizer=tiny_tokenizer(), windows_NL=ids, settings=settings
    )
    assert (figures.pruned.empty, figures.pruned.tokens) == (1.0, 0.0)
    assert figures.dense.tokens > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            Generation(prompts="held_out", samples=9, prompt_tokens=4, new_tokens=8),
            "9 prompts, and the held-out text has 5 windows",
        ),
        (
            Generation(prompts="held_out", samples=2, prompt_tokens=20, new_tokens=8),
            "exceed the 24 tokens of a held-out window",
        ),
    ],
)
def test_generation_needs_text(settings: Generation, said: str) -> None:
    """More prompts than windows, or windows that are too short, are refused with the limit."""
    with pytest.raises(RecipeError, match=said):
        side_by_side(
            tiny_model("llama"),
            tiny_model("llama"),
            tokenizer=tiny_tokenizer(),
            windows_NL=windows(),
            settings=settings,
        )


@pytest.mark.parametrize(
    "own",
    [{"penalty_alpha": 0.6}, {"dola_layers": "low"}, {"force_words_ids": [[1]]}],
    ids=lambda own: str(*own),
)
def test_a_models_own_generation_settings_are_ignored(own: dict[str, Any]) -> None:
    """Settings for a search strategy that needs code from the hub affect neither comparison nor verification."""
    plain, model = (tiny_model("llama", vocab_size=260) for _ in range(2))
    model.generation_config.update(**own)
    before = model.generation_config
    windows_NL = torch.arange(24).reshape(1, 24)
    settings = Generation(samples=1, prompt_tokens=8, new_tokens=8)
    found = side_by_side(plain, model, tokenizer=tiny_tokenizer(), windows_NL=windows_NL, settings=settings)
    assert found.dense == found.pruned
    time_generation(model, windows_NL, new_tokens=4)
    assert model.generation_config is before
    assert generate(model, windows_NL, use_cache=True) == generate(plain, windows_NL, use_cache=True)
