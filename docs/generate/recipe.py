"""Recipe reference: every key of a recipe, from the fields of the sections and their descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmprune.common.schema import Size, format_size
from llmprune.common.variants import Variant
from llmprune.recipe.mixes import mix_names, read_mix
from llmprune.recipe.model import Device
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import models_in, short

_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_LIMITS = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "at most"),
)
Seen = dict[tuple[str, str | None], str]  # key and meaning of each row so far, and the section it is in


def recipe_reference() -> str:
    """Markdown with one table for each section of a recipe."""
    seen: Seen = {}
    parts = []
    for name, field in Recipe.model_fields.items():
        required = " Required." if field.is_required() else ""
        rows = _rows(_fields_in(field) or {name: field}, "", section=name, seen=seen)
        table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"## `{name}`\n\n{field.description}{required}\n\n{table}")
    return "\n\n".join([*parts, *map(_mix, mix_names())])


def _mix(name: str) -> str:
    """Section with the table of a mix's sources."""
    sources = read_mix(name)
    total = sum(source.weight for source in sources)
    rows = [
        f"| {source.name} | `{source.dataset}` | {', '.join(filter(None, (source.config, source.split)))} | "
        f"{source.weight / total:.1%} | {source.licence} | `{source.revision}` |"
        for source in sources
    ]
    head = ["| name | data set | config and split | share | licence | commit |", "|---|---|---|---|---|---|"]
    return f"## Mix `{name}`\n\nThe text of `calibration: {{mix: {name}}}`.\n\n" + "\n".join([*head, *rows])


def _rows(fields: dict[str, FieldInfo], prefix: str, *, section: str, seen: Seen) -> Iterator[str]:
    """One row for each key, followed by the keys inside it; keys explained earlier are only named."""
    for name, field in fields.items():
        seen.setdefault((name, field.description), section)
        inside = _fields_in(field)
        known = [key for key in inside if (key, inside[key].description) in seen]
        new = {key: inside[key] for key in inside if key not in known}
        value = _words(field.annotation, field.metadata) + _limits(field)
        if known and not new:
            value = f"the keys of `{seen[known[0], inside[known[0]].description]}`"
        elif known:
            value += " with " + ", ".join(f"`{key}`" for key in known) + " as here, and:"
        cells = (value, _default(field), field.description or "")
        yield f"| `{prefix}{name}` | " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        entry = "[]" if "list of" in value else ""
        yield from _rows(new, f"{prefix}{name}{entry}.", section=section, seen=seen)


def _fields_in(field: FieldInfo) -> dict[str, FieldInfo]:
    """Keys inside a key; for a criterion those of every kind."""
    found = [item for model in models_in(field.annotation) for item in model.model_fields.items()]
    return {name: inner for name, inner in found if name != "kind"}


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Type of a key in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation == Size or any(item in get_args(Size)[1:] for item in metadata):
        return "size, such as `5GB`"
    if annotation == Device:
        return "device"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of: {_words(inner[0])}"
    if origin is dict:
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if inner:  # a union; None is said by the default, and an Annotated adds nothing here
        members = [part for part in inner if part is not type(None) and (get_origin(part) or isinstance(part, type))]
        return " or ".join(dict.fromkeys(_words(part) for part in members))
    if issubclass(annotation, Variant):
        return " or ".join(f"`{{kind: {kind.model_fields['kind'].default}}}`" for kind in annotation.kinds())
    return "mapping"


def _limits(field: FieldInfo) -> str:
    said = [
        f"{word} {getattr(item, name)}"
        for item in field.metadata
        for kind, name, word in _LIMITS
        if isinstance(item, kind)
    ]
    return " " + ", ".join(said) if said else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, BaseModel):
        kind = getattr(field.default, "kind", None)
        return f"`{{kind: {kind}}}`" if kind else ""
    if _words(field.annotation, field.metadata).startswith("size"):
        return f"`{format_size(field.default).replace(' ', '')}`"
    if field.default == ():
        return "`[]`"
    return f"`{field.default}`" if isinstance(field.default, str) else f"`{short(field.default)}`"
