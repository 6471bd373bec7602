"""Limits on the size and nesting of YAML that clients send."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from llmprune.common.errors import RecipeError
from llmprune.recipe.yaml_reader import NOT_YAML

RECIPE_LIMIT = 32 * 1024  # bytes of a recipe or an override; reading YAML takes about 5 µs a byte
_MAX_DEPTH = 20  # nested mappings and lists; a valid recipe has at most 5


def refuse_costly(text: str) -> None:
    """Raise RecipeError for YAML whose reading costs far more than its size suggests.

    A few hundred bytes of aliases and merge keys can expand to gigabytes, and PyYAML's run time is quadratic in the
    nesting depth: 100,000 brackets took 16 minutes.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > RECIPE_LIMIT:
        raise RecipeError(f"{size:,} bytes; over the network at most {RECIPE_LIMIT:,} are read", "recipe")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError("YAML aliases (*name) are not read over the network; write the values out", "recipe")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise RecipeError(f"brackets or mappings are nested more than {_MAX_DEPTH} deep", "recipe")
    except NOT_YAML:
        return  # the recipe's own reader reports the syntax error


def refuse_costly_parts(text: str, overrides: Sequence[str]) -> None:
    """Apply ``refuse_costly`` to a recipe and to the value of each override."""
    refuse_costly(text)
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_costly(value)
        if key.count(".") > _MAX_DEPTH:
            raise RecipeError(f"--set: a key is nested more than {_MAX_DEPTH} deep", "recipe")
