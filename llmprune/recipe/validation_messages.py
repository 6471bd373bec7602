"""Turn validation errors of a recipe into sentences: the key's path, its value, the limit, the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from reprlib import Repr
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llmprune.common.errors import MOST_PROBLEMS, did_you_mean, shortened
from llmprune.common.variants import Variant

Problem = dict[str, Any]
Path = tuple[Any, ...]

_MUST_BE = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_type": "text",
    "string_too_short": "text of at least {min_length} character",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "union_tag_not_found": "a mapping with {discriminator}",
}
_MOST_EXACT = 2**53  # whole numbers up to this are exact as floats
_LEAST_PERCENT = 2  # smaller values above 1 are no percentages, such as 1.5
_LIMITS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
_NO_MAPPING = ("model_type", "model_attributes_type")


def describe_problems(error: ValidationError, schema: type[BaseModel], *, data: Any) -> list[str]:
    """Return one sentence for each wrong place in ``data``, in the order of the schema; of very many the first ones."""
    by_path: dict[Path, list[Problem]] = {}
    for problem in _problems(error):
        by_path.setdefault(_path(problem, data), []).append(problem)
    outer = {path[:length] for path in by_path for length in range(len(path))}
    # A problem inside a value is more specific than a problem with the value as a whole.
    innermost = [(path, problems) for path, problems in by_path.items() if path not in outer]
    sentences = [_sentence(path, problems, schema=schema) for path, problems in innermost[: MOST_PROBLEMS + 1]]
    return shortened(sentences, len(innermost))


def wrong_places(error: ValidationError, data: Any) -> list[Path]:
    """Return the keys that are wrong; for missing keys, and for keys that contradict each other, their section."""
    found = []
    for problem in _problems(error):
        path = _path(problem, data)
        path = path[:-1] if problem["type"] == "missing" else path
        listed = next((index for index, part in enumerate(path) if isinstance(part, int)), len(path))
        found.append(path[:listed])  # the whole list: its entries have no names
    return list(dict.fromkeys(found))


def short(value: Any) -> str:
    """Format a value as YAML does, in at most about 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' * (value < 0)}.inf"
    text = _repr.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _problems(error: ValidationError) -> list[Problem]:
    """Return the problems of an error, without those that other kinds have with a section that names its kind."""
    found: list[Problem] = [dict(details) for details in error.errors(include_url=False)]
    others = {one["loc"][:-1] for one in found if one["type"] == "literal_error" and one["loc"][-1] == "kind"}
    named = {
        other[:-1]
        for other in others
        for loc in (one["loc"] for one in found)
        if len(loc) > len(other) and loc[: len(other) - 1] == other[:-1] and loc[: len(other)] not in others
    }
    dropped = [other for other in others if other[:-1] in named]
    return [one for one in found if not any(one["loc"][: len(other)] == other for other in dropped)]


def _path(problem: Problem, data: Any) -> Path:
    """Return the keys that lead to a problem, without the names of union members that pydantic puts between them."""
    path: list[Any] = []
    location = problem["loc"]
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if (isinstance(data, dict) and part in data) or (isinstance(data, list | tuple) and isinstance(part, int)):
            path.append(part)
            data = data[part]
        elif problem["type"] in ("missing", *_UNKNOWN_KEY) and last:
            path.append(part)
    if problem["type"] == "union_tag_invalid":
        path.append(problem["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _sentence(path: Path, problems: Sequence[Problem], *, schema: type[BaseModel]) -> str:
    first = problems[0]
    kind, value = first["type"], first["input"]
    place = ".".join(_plain(part) for part in path) or "recipe"
    if kind in _UNKNOWN_KEY:
        return f"{place}: unknown key{_right_key(schema, first['loc'][:-1], key=str(path[-1])[:60])}"
    meaning = _meaning(schema, path, location=first["loc"])
    if kind == "missing":
        return f"{place}: is missing; add it{meaning}"
    if kind == "value_error":
        given = "" if isinstance(value, dict) else f" (given: {short(value)})"
        return f"{place}: {first['msg'].removeprefix('Value error, ')}{given}"
    near = ""
    if kind == "union_tag_invalid":
        value = first["ctx"]["tag"]
        tags = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
        near = did_you_mean(str(value), tags)
    elif kind == "literal_error" and isinstance(value, str):
        choices = [choice for problem in problems for choice in _choices(problem)]
        near = did_you_mean(value, choices) or (_kind_elsewhere(schema, value) if path[-1] == "kind" else "")
    elif kind in _NO_MAPPING:
        near = _as_mapping(schema, path, value=value)
    elif kind == "tuple_type" and isinstance(value, str | int | float) and not isinstance(value, bool):
        near = f"; write {_as_list(value)}"
    limits = [problem for problem in problems if problem["type"] in _LIMITS]  # more helpful than the type's name
    valid: dict[str, str] = {}  # of the members of a union, each once: "above 0" and "above 0.0" are one
    for text in map(_valid, limits or problems):
        valid.setdefault(text.removesuffix(".0"), text)
    near += _quotes(problems, value) or _as_number(problems, value)
    return f"{place}: must be {' or '.join(valid.values())}, not {short(value)}{near}{meaning}"


def _valid(problem: Problem) -> str:
    """Describe the values that are valid in place of the wrong one."""
    template = _MUST_BE.get(problem["type"])
    if template is None:
        message: str = problem["msg"]
        return message.removeprefix("Input should be ")
    return re.sub(r"\b(True|False)\b(?!')", lambda word: word[0].lower(), template.format(**problem.get("ctx", {})))


def _choices(problem: Problem) -> list[str]:
    """Return the texts that one member of a union accepts."""
    return re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))


def _quotes(problems: Sequence[Problem], value: Any) -> str:
    """Return the remedy where only quotes are wrong or missing: ``remove: "6"``, ``revision: 0123456``."""
    kinds = {problem["type"] for problem in problems}
    if "string_type" in kinds and isinstance(value, bool | int | float):
        return "; put it in quotes if it is a name"
    number = kinds & {"int_type", "float_type"} and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+", value)
    boolean = "bool_type" in kinds and isinstance(value, str) and value.lower() in ("true", "false")
    return "; remove the quotes" if number or boolean else ""


def _as_number(problems: Sequence[Problem], value: Any) -> str:
    """Return the remedy for a percentage in place of a fraction, and for a whole number in a float's notation."""
    kinds = {problem["type"] for problem in problems}
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"; write {value:.0f}" if abs(value) < _MOST_EXACT else ""
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?) ?%", value) if isinstance(value, str) else None
    if percent is not None and "float_type" in kinds:
        value = float(percent[1])
    elif isinstance(value, str) or not any(problem.get("ctx", {}).get("le") == 1 for problem in problems):
        return ""
    return f"; write {value / 100:g} for {value:g} %" if _LEAST_PERCENT <= value <= 100 else ""


def _as_list(value: str | int | float) -> str:
    """Write one value as a list, and text with commas as a list of what they separate."""
    if isinstance(value, str) and len(value) <= 60 and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
        return f"[{', '.join(part.strip() for part in value.split(','))}]"
    return f"[{short(value)}]"


def _plain(part: Any) -> str:
    text = str(part)
    return text if re.fullmatch(r"[\w-]{1,60}", text) else short(text)


def _meaning(schema: type[BaseModel], path: Path, *, location: Path) -> str:
    """Return the description of the field at a path, in brackets. ``location``: the path with the members of unions."""
    field: FieldInfo | None = None
    models = [schema]
    for part in path:
        having = [model for model in models if part in model.model_fields]
        having = [model for model in having if {model.__name__, *_kinds(model)} & {*location}] or having
        found = [model.model_fields[part] for model in having]
        field = found[0] if found else None
        models = [inner for one in found for inner in models_in(one.annotation)] if found else models
    return f" ({field.description.rstrip('.')})" if field and field.description else ""


def _right_key(schema: type[BaseModel], location: Path, *, key: str) -> str:
    """Return the remedy for an unknown key: its spelling, the sections that have it, or the valid keys."""
    models = _models_at(schema, location)
    if any(key in _kinds(model) for model in models):
        return f"; write kind: {key}"
    having = [kind for model in models if key in model.model_fields for kind in _kinds(model)]
    if having:
        return f" of this kind; it is one of {' and '.join(having)}"
    homes = _places_of(schema, lambda model: key in model.model_fields)
    if homes:
        return f" here; it is a key of {', '.join(homes)}"
    valid = list(dict.fromkeys(name for model in models for name in model.model_fields))
    return did_you_mean(key, valid) or "; valid keys: " + ", ".join(valid)


def _as_mapping(schema: type[BaseModel], path: Path, *, value: Any) -> str:
    """Return the remedy for a plain value in place of a section: how to write it, or the keys to choose from."""
    models = _models_at(schema, path)
    kinds = list(dict.fromkeys(kind for model in models for kind in _kinds(model)))
    if not kinds:
        return "; its keys: " + ", ".join(dict.fromkeys(name for model in models for name in model.model_fields))
    if value in kinds:
        return f"; write {{kind: {value}}}"
    remedy = f"; write {{kind: NAME}} with one of {', '.join(kinds)}"
    return remedy + (did_you_mean(value, kinds) or _kind_elsewhere(schema, value) if isinstance(value, str) else "")


def _kind_elsewhere(schema: type[BaseModel], kind: str) -> str:
    homes = _places_of(schema, lambda model: kind in _kinds(model))
    return f"; {kind} belongs in {' or '.join(homes)}" if homes else ""


def _places_of(schema: type[BaseModel], wanted: Callable[[type[BaseModel]], bool], *, head: str = "") -> list[str]:
    """Return the dotted places of the sections of a schema that satisfy ``wanted``."""
    found = []
    for name, field in schema.model_fields.items():
        models = list(models_in(field.annotation))
        if any(wanted(model) for model in models):
            found.append(f"{head}{name}")
        found += [place for model in models for place in _places_of(model, wanted, head=f"{head}{name}.")]
    return list(dict.fromkeys(found))


def _models_at(schema: type[BaseModel], location: Path) -> list[type[BaseModel]]:
    """Return the sections that a location may lead to; a criterion's ``kind`` chooses among several."""
    models = [schema]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in models_in(field.annotation)] or models
        else:
            models = [model for model in models if part in _kinds(model)] or models
    return models


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind and get_origin(kind.annotation) is Literal else ()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections in a field's type: the type itself, and those in a union, list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from annotation.kinds() if issubclass(annotation, Variant) else (annotation,)
    for inner in get_args(annotation):
        yield from models_in(inner)


_repr = Repr()  # with bounded work: the full repr of nested aliases can have gigabytes
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 50, 50, 30
