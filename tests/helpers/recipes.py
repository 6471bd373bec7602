"""A small valid recipe as data, and the problems of a changed one."""

from __future__ import annotations

import pytest

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe

MODEL = "model: {id: org/model}\n"


BASE = MODEL + "calibration: {dataset: org/text}\n"


def problems(text: str, overrides: list[str] | None = None) -> list[str]:
    """The sentences about a wrong recipe."""
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, overrides or [])
    assert caught.value.exit_code == 2
    return caught.value.problems


def table(text: str) -> list[tuple[str, str]]:
    """Pairs of lines: a section, and the beginning of what is said of it."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return list(zip(lines[::2], lines[1::2], strict=True))


def with_section(section: str) -> str:
    """Return a valid recipe in which one section is added or replaced."""
    name = section.partition(":")[0]
    return "".join(f"{line}\n" for line in BASE.splitlines() if not line.startswith(name)) + section
