"""Recipes as Python code gives them: a file, text, a dictionary, or a ``Recipe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import RecipeError

if TYPE_CHECKING:
    from llmprune.recipe.recipe import Recipe

    RecipeInput = str | Path | Mapping[str, Any] | Recipe


def text_of(recipe: RecipeInput, overrides: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return a recipe's YAML and all its overrides. A string without a line break is the path of a file.

    Raises RecipeError for a file that cannot be read.
    """
    if isinstance(recipe, str) and ("\n" in recipe or recipe.lstrip().startswith("{")):
        return recipe, list(overrides)
    if isinstance(recipe, str | Path):
        return _read(Path(recipe)), list(overrides)
    if isinstance(recipe, Mapping):
        from llmprune.recipe.yaml_reader import dump

        return dump(dict(recipe)), list(overrides)
    return recipe.text, [*recipe.overrides, *overrides]


def _read(path: Path) -> str:
    from llmprune.common.text_files import utf8

    try:
        return utf8(path.read_bytes())
    except ValueError as error:
        raise RecipeError(f"the recipe {path} {error}") from error
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}; give a YAML file, or its text"
        ) from error
