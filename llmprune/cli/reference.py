"""The README's reference of recipe and commands, written from the code.

    python -m llmprune.cli.reference README.md

puts each text between its two markers, ``<!-- recipe reference -->`` and
``<!-- commands -->``; a test holds that the README has what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmprune.common.schema import Size, format_size
from llmprune.common.variants import Variant
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
    """Every key of a recipe as Markdown: a table a section, from the fields and their descriptions."""
    seen: Seen = {}
    parts = []
    for name, field in Recipe.model_fields.items():
        required = " Required." if field.is_required() else ""
        rows = _rows(_fields_in(field), "", section=name, seen=seen)
        table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"**`{name}`**: {field.description}{required}\n\n{table}")
    return "\n\n".join(parts)


def command_reference(app: Any = None) -> str:
    """Every command, argument and option as Markdown, from the help texts of the command line."""
    import typer

    if app is None:
        from llmprune.cli.main import app as own

        app = own
    root: Any = typer.main.get_command(app)
    commands = getattr(root, "commands", {})
    parts = [_command(f"llmprune {name}", command) for name, command in commands.items() if not command.hidden]
    if any(not parameter.hidden for parameter in root.params):
        parts.append(_command("llmprune", root))
    return "\n\n".join(parts)


def write_reference(page: str) -> str:
    """The page with the texts between their markers. Raises ValueError where a marker is missing."""
    for name, text in (("recipe reference", recipe_reference()), ("commands", command_reference())):
        before, opening, rest = page.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise ValueError(f"needs the lines <!-- {name} --> and <!-- /{name} -->; add them")
        page = f"{before}{opening}\n{text}\n\n{closing}{after}"
    return page


def _rows(fields: dict[str, FieldInfo], prefix: str, *, section: str, seen: Seen) -> Iterator[str]:
    """A row for each key, then for the keys inside it; what was explained before is only named."""
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
    """The keys inside a key; of a criterion, those of every kind."""
    found = [item for model in models_in(field.annotation) for item in model.model_fields.items()]
    return {name: inner for name, inner in found if name != "kind"}


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a person says it."""
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


def _command(title: str, command: Any) -> str:
    """The title with its arguments, the help text, and a line for each argument and option."""
    parameters = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [_argument(parameter) for parameter in parameters if not _is_option(parameter)]
    heading = " ".join([title, *arguments])
    lines = [f"- `{_spelling(parameter)}`: {_explanation(parameter)}" for parameter in parameters]
    return "\n\n".join(filter(None, [f"**`{heading}`**", _help_of(command), "\n".join(lines)]))


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _spelling(parameter: Any) -> str:
    if not _is_option(parameter):
        return _argument(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or parameter.name.strip('_').upper()}"


def _explanation(parameter: Any) -> str:
    notes = []
    if _is_option(parameter) and parameter.required:
        notes.append("required")
    if not callable(parameter.default) and parameter.default not in (None, False, [], ()):
        notes.append(f"default: `{parameter.default}`")
    text = " ".join((parameter.help or "").split())
    return f"{text} ({', '.join(notes)})" if notes else text


def _help_of(command: Any) -> str:
    return "\n".join(line.strip() for line in (command.help or "").split("\f")[0].strip().splitlines())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        try:
            written = write_reference(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: {error}")
        path.write_text(written, encoding="utf-8")
