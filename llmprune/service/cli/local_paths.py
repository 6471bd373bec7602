"""Paths of a recipe that mean something on the client's machine: the service reads them on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.service.jobs.recipe_policy import may_be_path, texts_in
from llmprune.service.settings import is_loopback

_ELSEWHERE = (
    "on its own machine, under its --allow-root folders, or on the hub; copy it there and name it as it is there"
)
_TASKS = "among its --allow-tasks folders, which its operator names"


def paths_of_this_machine(text: str, overrides: Sequence[str], *, server: str) -> list[str]:
    """Return a sentence for each path that exists here and that the service takes as one of its own.

    An absolute path is the same on a service of this machine. A recipe that cannot be read names none; the service
    says what is wrong with it.
    """
    try:
        recipe = Recipe.parse(text, overrides)
    except RecipeError:
        return []
    here = is_loopback(urlsplit(server).hostname or "")
    return [
        f"{place}: {value!r} is a {'folder' if Path(value).is_dir() else 'file'} here, but the service looks for it "
        + (_TASKS if place == "evaluation.include_path" else _ELSEWHERE)
        for place, value in texts_in(recipe)
        if may_be_path(place) and not (here and Path(value).is_absolute()) and _exists(value)
    ]


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False
