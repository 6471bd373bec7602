"""Every problem of a recipe as a sentence: the key's path, the value, the limit, the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llmprune.errors import did_you_mean

_REMEDIES = {
    "missing": "is missing; add it",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
}


def describe_problems(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One sentence for every mistake, in the order of the recipe."""
    problems = [dict(problem) for problem in error.errors(include_url=False)]
    paths = [_path(problem["loc"]) for problem in problems]
    return [
        _describe(problem, schema)
        for index, problem in enumerate(problems)
        if paths[index] not in paths[:index]  # the other members of a union say it again
        and not (problem["type"] == "too_short" and any(_inside(path, paths[index]) for path in paths))
    ]


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in _visible(location)) or "recipe"


def _inside(path: str, outer: str) -> bool:
    return path.startswith(outer + ".")


def _describe(problem: dict[str, Any], schema: type[BaseModel]) -> str:
    kind, location, value = problem["type"], problem["loc"], problem["input"]
    path = _path(location)
    if kind == "extra_forbidden":
        valid = _valid_keys(schema, location[:-1])
        hint = did_you_mean(str(location[-1]), valid)
        return f"{path}: unknown key{hint or '; valid keys'}" + ("" if hint else f": {', '.join(valid)}")
    if kind == "missing":
        return f"{path}: {_REMEDIES[kind]}"
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind in _REMEDIES:
        said = _REMEDIES[kind]
    elif kind == "value_error":
        return f"{path}: {said}" + (f" (given: {_short(value)})" if not isinstance(value, dict) else "")
    elif problem["msg"].startswith("Input should be "):
        said = f"must be {said}"
    return f"{path}: {said}, not {_short(value)}"


def _visible(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """The parts of a location that are keys in the recipe: pydantic adds the names of union members."""
    members = ("function-", "literal[", "dict[", "int", "str", "bool")
    for part in location:
        if isinstance(part, int) or (part.islower() and not part.startswith(members)):
            yield part


def _valid_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = schema.model_fields.get(str(part))
        if field is not None:
            schema = next(_models(field.annotation), schema)
    return list(schema.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
