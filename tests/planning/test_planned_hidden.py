"""The hidden size that a recipe asks for: accepted, rounded, or refused with what is possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from helpers.recipes import BASE, problems

from llmprune.anatomy.types import Anatomy, HiddenSize
from llmprune.common.errors import RecipeError
from llmprune.planning.sizes.planned_hidden import PlannedHidden, planned_hidden
from llmprune.recipe.recipe import Recipe


def _planned(
    hidden: str, *, size: int = 576, step: int = 9, refusal: str | None = None, more: str = ""
) -> PlannedHidden:
    found = HiddenSize("hidden_size", size, {}, tuple(range(step, size, step)), (), (), refusal)
    anatomy = cast(Anatomy, SimpleNamespace(hidden=found))
    return planned_hidden(Recipe.parse(f"{BASE}hidden: {hidden}\n{more}"), anatomy)


@pytest.mark.parametrize(
    ("hidden", "size", "step", "kept"),
    [
        ("0.9", 576, 9, 504),  # 512 is no multiple of 9 heads
        ("0.9", 4096, 32, 3712),  # of the near multiples of 128 the nearest
        ("{keep: 0.9, multiple: 256}", 4096, 32, 3584),
        ("3584", 4096, 32, 3584),
        ("4096", 4096, 32, None),
        ("1.0", 4096, 32, None),
    ],
)
def test_sizes_are_those_that_the_config_accepts(hidden: str, size: int, step: int, kept: int | None) -> None:
    """A fraction is rounded to a size that hardware likes, a number is taken as it is."""
    assert _planned(hidden, size=size, step=step).size == kept


@pytest.mark.parametrize(
    ("hidden", "more", "sentence"),
    [
        ("512", "", "no hidden_size 512; the nearest that it accepts: 504 and 513"),
        ("600", "", "600 is more than the hidden size 576"),
        ("{keep: 0.9, multiple: 1000}", "", "no hidden size below 576 that is a multiple of 1000"),
        ("0.9", "sparsity: {pattern: 2:4}", "would undo the zeros of sparsity"),
        ("0.9", "recover: {tokens: 1M, rounds: 2}", "cut in one round"),
    ],
)
def test_what_is_not_possible_is_said(hidden: str, more: str, sentence: str) -> None:
    """The sentence has the limit and the remedy."""
    with pytest.raises(RecipeError, match=sentence):
        _planned(hidden, more=more)


def test_a_model_that_cannot_be_cut_gives_its_reason() -> None:
    """The reason is that of the anatomy."""
    with pytest.raises(RecipeError, match="no residual channels of this model can be removed: its heads follow"):
        _planned("0.9", refusal="its heads follow")


def test_a_budget_does_not_stand_beside_it() -> None:
    """The budget chooses the shape."""
    assert "hidden cannot be set beside it" in problems(f"{BASE}hidden: 0.9\nbudget: {{parameters: 0.8}}\n")[0]
