"""Lines of a recipe that its problems are about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.yaml_reader import NOT_YAML
from llmprune.service.recipe_policy.yaml_limits import refuse_costly

_LINE = re.compile(r"line (\d+)\b")
_KEY = re.compile(r"[a-z_]\w*(?:\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class LinedProblem:
    """A problem of a recipe, and the line that it is about, from 1; None: of the whole recipe."""

    text: str
    line: int | None


def with_lines(recipe: str, problems: Sequence[str]) -> list[LinedProblem]:
    """Return the problems, each with the line of the deepest key that it names and the recipe has."""
    root = _nodes(recipe)
    return [LinedProblem(problem, _line_of(root, problem)) for problem in problems]


def _line_of(root: yaml.Node | None, problem: str) -> int | None:
    line = _LINE.match(problem)
    if line is not None:
        return int(line[1])
    key = _KEY.match(problem)
    return _line_at(root, key[0].split(".")) if key is not None else None


def _line_at(root: yaml.Node | None, path: Sequence[str]) -> int | None:
    """Return the line of a key, or of the innermost section around it that the recipe has."""
    node, line = root, None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next((entry for entry in node.value if entry[0].value == part), None)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    if line is None and path[0] in Recipe.model_fields and isinstance(root, yaml.MappingNode):
        return root.start_mark.line + 1  # a section that is missing: the recipe's first line
    return line


def _nodes(recipe: str) -> yaml.Node | None:
    """Return the nodes of a recipe; None where it is costly to read, or no YAML."""
    try:
        refuse_costly(recipe)
        return yaml.compose(recipe, Loader=yaml.SafeLoader)
    except (RecipeError, *NOT_YAML):
        return None
