"""Warnings about paths of a recipe that exist on the client's machine but are read on the service's machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.service.recipe_policy.free_text import free_texts
from llmprune.service.recipe_policy.rules import may_be_path
from llmprune.service.settings import is_loopback

_ON_THE_SERVICE = (
    "on its own machine, under its --allow-root folders, or on the hub; copy it there and name it as it is there"
)
_TASKS = "among its --allow-tasks folders, which its operator names"


def paths_of_this_machine(text: str, overrides: Sequence[str], *, server: str) -> list[str]:
    """Return a sentence for each path that exists on this machine and that the service looks for on its own machine.

    Absolute paths are the same for a service on this machine. A recipe that cannot be read gives no sentences, for the
    service reports its problems.
    """
    try:
        recipe = Recipe.parse(text, overrides)
    except RecipeError:
        return []
    here = is_loopback(urlsplit(server).hostname or "")
    return [
        f"{text.key}: {text.value!r} is a {'folder' if Path(text.value).is_dir() else 'file'} here, but the service "
        f"looks for it {_TASKS if text.key == 'evaluation.include_path' else _ON_THE_SERVICE}"
        for text in free_texts(recipe)
        if may_be_path(text.key) and not (here and Path(text.value).is_absolute()) and _exists(text.value)
    ]


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False
