"""Change values of a recipe by texts of the form ``section.key=value``."""

from __future__ import annotations

import copy
from typing import Any

from llmprune.common.errors import RecipeError
from llmprune.recipe.validation_messages import short
from llmprune.recipe.yaml_reader import read_value

_MOST_DIGITS = 9  # of an index in a list


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value in a recipe's data, in place. Raises RecipeError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError("the form is section.key=value, such as width.mlp=0.5")
    value = read_value(text)
    place: Any = data
    for depth, name in enumerate(keys[:-1], start=1):
        key = _key_in(place, name)
        child = place[key] if isinstance(place, list) else place.get(key)
        if child is not None and child is not False and not isinstance(child, dict | list):
            raise RecipeError(f"{'.'.join(keys[:depth])} is {short(child)}, which has no keys; set it as a whole")
        # A copy, because a YAML alias may share this mapping with another section.
        place[key] = copy.copy(child) if child else {}
        place = place[key]
    place[_key_in(place, keys[-1])] = value


def _key_in(place: Any, name: str) -> Any:
    """Return the key or list index that ``name`` spells; a device's number is an int in YAML."""
    if isinstance(place, dict):
        return next((key for key in place if str(key) == name), name)
    if not name.isdecimal() or len(name) > _MOST_DIGITS or int(name) >= len(place):
        raise RecipeError(
            f"{short(name)} is not an index of a list of {len(place)}; count from 0, or set the list as a whole"
        )
    return int(name)
